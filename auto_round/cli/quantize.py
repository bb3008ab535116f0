"""`auto-round MODEL …`: quantizes a model, saves it, verifies what was saved, and says what came of it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from auto_round.algorithms import ALGORITHMS, ALIASES
from auto_round.cli.launch import is_rank, launch
from auto_round.cli.parser import (
    Groups,
    Names,
    Parser,
    UsageError,
    add_debug,
    add_tasks,
    add_trust,
    comma_list,
    layer_config,
    number,
    whole_number,
)
from auto_round.settings import RECIPES

ABOUT = """Quantize a model: auto-round MODEL --scheme W4A16

MODEL is a model folder or a hub id. Without further options the calibration text shipped with the package is used and
rounding is tuned for 200 iterations per block. A run that was stopped goes on with the same command."""

# Options of the interface that people know for which this version has no counterpart.
# fmt: off
ABSENT = (
    "--num_hidden_layers", "--debug_layer_num", "--enable_deterministic_algorithms",
    "--model_free", "--disable_model_free", "--scale_dtype", "--nblocks",
    "--enable_norm_bias_tuning", "--enable_alg_ext", "--enable_lfq", "--enable_neuqi",
    "--awq_duo_scaling", "--awq_n_grid", "--awq_seqlen", "--awq_smooth_batch_size", "--awq_apply_clip",
    "--awq_clip_as_init", "--rotation_type", "--rotation_backend", "--rotation_block_size", "--eval_gen_kwargs",
    "--fewshot_as_multiturn", "--eval_task_by_task", "--eval_backend", "--vllm_args", "--eval_model_dtype",
    "--add_bos_token", "--prompt_file",
    "--prompt", "--metrics", "--image_save_dir", "--guidance_scale", "--calib_num_inference_steps",
    "--num_inference_steps", "--generator_seed", "--diffusion_tuning_cache_size",
)
# fmt: on

# What the command itself uses; everything else that the user gave is an argument of `AutoRound`.
_OWN = (
    "model",
    "model_option",
    "recipe",
    "format",
    "output_dir",
    "max_shard_size",
    "tasks",
    "eval_bs",
    "limit",
    "force",
)
_ACCEPTED = ("num_fewshot", "debug", "mllm", "disable_trust_remote_code", "platform")


def make_parser(recipe: str = "default") -> Parser:
    """The parser; options that the user leaves out are not in its result, so that a recipe can fill them."""
    parser = Parser("quantize", ABOUT, "model", ABSENT, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--model",
        "--model_name",
        "--model_name_or_path",
        dest="model_option",
        metavar="MODEL",
        default=None,
        help="the same as MODEL",
    )
    parser.add_argument("--recipe", choices=tuple(RECIPES), default=recipe, help=f"named settings (default: {recipe})")
    _add_scheme(parser)
    _add_run(parser)
    _add_tuning(parser)
    add_tasks(parser)
    parser.set_defaults(tasks=None, eval_bs=None, limit=None, num_fewshot=None, debug=False, force=False)
    return parser


def _add_scheme(parser: Parser) -> None:
    group = parser.add_argument_group("what is stored")
    group.add_argument("--scheme", help="preset: W4A16 (default), W2A16G32 …; `auto-round list schemes` shows them")
    _add_choice(group)
    group.add_argument(
        "--bits",
        "--bit",
        type=number,
        metavar="N",
        help="width of the codes, 2 to 8; with --schemes the average, 3.5 …",
    )
    group.add_argument(
        "--group_size",
        type=whole_number,
        metavar="N",
        help="inputs that share a scale; -1: a whole row, 0: the whole tensor",
    )
    group.add_argument("--asym", dest="sym", action="store_false", help="asymmetric: with zero points")
    group.add_argument("--sym", action="store_true", help="symmetric (the default of most schemes)")
    group.add_argument(
        "--data_type", "--dtype", metavar="NAME", help="number family of the codes: int, mx_fp, nv_fp, fp …"
    )
    group.add_argument("--act_bits", type=whole_number, metavar="N", help="width of activations (16)")
    _add_activations(group)
    group.add_argument(
        "--layer_config",
        type=layer_config,
        metavar="RULES",
        help="rules by layer name or pattern: '{k_proj:{bits:8},lm_head:W8A16}'",
    )
    group.add_argument(
        "--ignore_layers", "--fp_layers", metavar="LAYERS", help="comma list of layers that stay as they are"
    )
    group.add_argument(
        "--quant_nontext_module", action=argparse.BooleanOptionalAction, help="quantize vision and audio towers too"
    )
    group.add_argument("--quant_lm_head", action=argparse.BooleanOptionalAction, help="quantize the output layer too")
    group.add_argument(
        "--to_quant_block_names", metavar="BLOCKS", help="comma list of blocks to quantize (default: all)"
    )
    group.add_argument("--format", "--formats", default=None, help="comma list; `auto-round list formats` shows them")
    group.add_argument(
        "--for", dest="engine", metavar="ENGINE", help="vllm, sglang, transformers, llama.cpp or mlx: picks the format"
    )
    group.add_argument("--output_dir", metavar="DIR", default="./tmp_autoround", help="default: ./tmp_autoround")
    group.add_argument(
        "--max_shard_size", metavar="SIZE", default=None, help="of the weight files: 5GB (default), 512MB …"
    )


def _add_choice(group: Any) -> None:
    """Several schemes, of which each layer gets one."""
    group.add_argument(
        "--schemes",
        nargs="+",
        action=Names,
        metavar="NAME",
        help="presets to choose from for each layer, such as W2A16,W4A16,W8A16, within --bits or --target-size",
    )
    group.add_argument("--target_size", metavar="SIZE", help="of the weights that are written, with --schemes: 20GB …")
    group.add_argument(
        "--shared_layers",
        nargs="+",
        action=Groups,
        metavar="LAYERS",
        help="comma list of layers that get one scheme, with --schemes; repeatable",
    )
    group.add_argument("--ignore_scale_zp_bits", action="store_true", help="--bits of --schemes counts codes alone")
    group.add_argument("--options", "--option", dest="schemes", nargs="+", action=Names, help=argparse.SUPPRESS)
    group.add_argument("--avg_bits", "--target_bits", dest="bits", type=number, help=argparse.SUPPRESS)


def _add_activations(group: Any) -> None:
    group.add_argument(
        "--act_group_size", type=whole_number, metavar="N", help="inputs that share an activation's scale"
    )
    group.add_argument("--act_data_type", "--act_dtype", metavar="NAME", help="number family of activations")
    group.add_argument("--act_asym", dest="act_sym", action="store_false", help="asymmetric activations")
    group.add_argument("--act_sym", action="store_true", help="symmetric activations")
    group.add_argument(
        "--disable_act_dynamic", dest="act_dynamic", action="store_false", help="a fixed scale, found by calibration"
    )
    for what, about in (("kv", "keys and values in the cache"), ("attention", "queries, keys and values")):
        group.add_argument(
            f"--static_{what}_dtype", metavar="fp8", help=f"find and store fixed float8 scales of {about}"
        )
        group.add_argument(
            f"--static_{what}_granularity", choices=("tensor", "head"), help="what a scale is for (tensor)"
        )
    group.add_argument("--super_bits", type=whole_number, help=argparse.SUPPRESS)
    group.add_argument("--super_group_size", type=whole_number, help=argparse.SUPPRESS)


def _add_run(parser: Parser) -> None:
    group = parser.add_argument_group("how it runs")
    group.add_argument("--dataset", help="calibration text: a .json, .jsonl or .txt file, hub names, or self")
    group.add_argument("--nsamples", "--nsample", type=whole_number, metavar="N", help="calibration samples (128)")
    group.add_argument("--seqlen", "--seq_len", type=whole_number, metavar="N", help="tokens per sample (2048)")
    group.add_argument(
        "--expert_topup",
        type=whole_number,
        metavar="N",
        help="candidates for each sample, of which those are used that reach rarely used experts (0)",
    )
    group.add_argument("--extra_data_dir", metavar="DIR", help="where the images or sounds of the dataset lie")
    group.add_argument("--template", metavar="FILE", help="a Jinja chat template instead of the processor's own")
    group.add_argument("--mllm", action="store_true", default=False, help=argparse.SUPPRESS)
    group.add_argument("--apply_chat_template", action="store_true", help="render the records with the chat template")
    group.add_argument(
        "--device_map",
        "--device",
        "--devices",
        metavar="DEVICE",
        help="cpu, cuda, 0, cuda:1, auto (default: 0); 0,1: tune on both",
    )
    group.add_argument("--force", action="store_true", help="go on although memory or disk will not do by the estimate")
    group.add_argument("--seed", type=whole_number, metavar="N", help="everything random follows it (42)")
    group.add_argument("--model_dtype", choices=("fp16", "float16", "bf16", "bfloat16", "fp32", "float32"))
    group.add_argument("--disable_amp", dest="amp", action="store_false", help="tune in the model's own dtype")
    group.add_argument(
        "--max_memory",
        metavar="SIZES",
        help="memory that may be used: 4GiB of RAM, or cpu=4GiB,0=20GiB (default: free)",
    )
    group.add_argument("--low_gpu_mem_usage", action="store_true", help="keep samples' activations out of the GPU")
    group.add_argument("--platform", choices=("hf",), help=argparse.SUPPRESS)
    memory = group.add_mutually_exclusive_group()
    memory.add_argument("--low_cpu_mem_usage", action="store_true", help=argparse.SUPPRESS)
    memory.add_argument(
        "--disable_low_cpu_mem_usage", dest="low_cpu_mem_usage", action="store_false", help=argparse.SUPPRESS
    )
    _add_switch(group, "torch_compile", "accepted: the tuning loop does not need compiling")
    add_trust(parser)
    add_debug(parser)


def _add_tuning(parser: Parser) -> None:
    group = parser.add_argument_group("tuning")
    group.add_argument(
        "--iters", "--iter", type=whole_number, metavar="N", help="steps per block (200); 0 rounds to nearest"
    )
    group.add_argument(
        "--minutes",
        type=number,
        metavar="N",
        help="of wall time: iters and scale_iters are picked, the best that fit by the estimate",
    )
    group.add_argument(
        "--batch_size", "--train_bs", "--bs", type=whole_number, metavar="N", help="samples that a step rests on (8)"
    )
    group.add_argument("--gradient_accumulate_steps", type=whole_number, metavar="N", help="batches per step (1)")
    group.add_argument("--lr", type=float, metavar="X", help="step of the rounding (1/iters)")
    group.add_argument("--minmax_lr", type=float, metavar="X", help="step of the clipping (lr)")
    group.add_argument(
        "--scale_iters", type=int, metavar="N", help="steps that train the scales of the whole model at the end (0)"
    )
    group.add_argument("--scale_lr", type=float, metavar="X", help="step of that training (0.003)")
    group.add_argument("--momentum", type=float, metavar="X", help="carries a step's direction over to the next (0.5)")
    group.add_argument(
        "--algorithm",
        "--algorithms",
        "--alg",
        "--algs",
        "--alg_config",
        "--alg_configs",
        type=_known,
        metavar="NAME",
        help="signround, adamround, or rtn for iters 0; `auto-round list algorithms`",
    )
    group.add_argument("--enable_adam", action=argparse.BooleanOptionalAction, help="the same as --algorithm adamround")
    group.add_argument(
        "--not_use_best_mse", action=argparse.BooleanOptionalAction, help="keep the last iterate, not the best"
    )
    _add_switch(group, "minmax_tuning", "tune the clipping (on)")
    _add_switch(group, "quanted_input", "tune on inputs from the quantized blocks before (on)")
    search = group.add_mutually_exclusive_group()
    search.add_argument("--disable_opt_rtn", action="store_true", help="plain rounding: no search of scales")
    search.add_argument("--enable_opt_rtn", dest="disable_opt_rtn", action="store_false", help="search scales (on)")


def _add_switch(group: Any, name: str, about: str) -> None:
    """`--enable_X` and `--disable_X` (also `--no-enable_X`) for the argument `enable_X`."""
    switch, dest = group.add_mutually_exclusive_group(), f"enable_{name}"
    switch.add_argument(f"--enable_{name}", dest=dest, action="store_true", help=about)
    switch.add_argument(f"--disable_{name}", f"--no-enable_{name}", dest=dest, action="store_false")


def _known(name: str) -> str:
    """An algorithm's name, checked before the model is read."""
    key = ALIASES.get(name.strip().lower(), name.strip().lower())
    if key not in ALGORITHMS:
        raise argparse.ArgumentTypeError(f"unknown algorithm {name!r}: known are {', '.join(ALGORITHMS)}")
    return key


def settings_for(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `AutoRound`: what the user gave, and what the recipe says about the rest."""
    own = (*_OWN, *_ACCEPTED)
    given = {name: value for name, value in vars(options).items() if name not in own and value is not None}
    if "minutes" not in given:
        return {**RECIPES[options.recipe], **given}
    if options.recipe != "default":
        raise UsageError(f"--minutes picks the settings that --recipe {options.recipe} names: give one of them")
    return given


def run(arguments: list[str], recipe: str = "default") -> int:
    parser = make_parser(recipe)
    if not arguments:
        parser.print_help()
        return 0
    options = parser.parse(arguments)
    model = the_model(options)
    tasks = comma_list(options.tasks)
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise UsageError('--tasks needs lm-eval: pip install "auto-round[eval]"; or leave --tasks out')
    formats = check_output(options)
    devices = comma_list(getattr(options, "device_map", None))
    if len(devices) > 1 and not is_rank():
        return launch([*arguments, "--recipe", options.recipe], devices)

    from auto_round.autoround import AutoRound
    from auto_round.cli.summary import print_report, silence_loading

    began = time.monotonic()
    compressor = AutoRound(model, **settings_for(options))
    silence_loading()
    _, found = compressor.quantize_and_save(
        options.output_dir, format=formats, max_shard_size=options.max_shard_size, force=options.force
    )
    if not compressor.ranks.main:
        return 0
    folders = [found] if isinstance(found, str) else found
    reports = [json.loads((Path(folder) / "report.json").read_text(encoding="utf-8")) for folder in folders]
    for report in reports:
        print_report(report, time.monotonic() - began)
    if tasks:
        _run_tasks(folders[-1], tasks, options, str(compressor.device))
    return 0


def the_model(options: argparse.Namespace) -> str:
    """The model, however it was given."""
    model = options.model_option or options.model
    if model is None or (options.model and options.model_option):
        raise UsageError("give one model: a folder or a hub id, as in `auto-round MODEL --scheme W4A16`")
    return model


def check_output(options: argparse.Namespace) -> str | None:
    """The formats' known names; what is wrong with them or with the shards' size is said before a model is fetched."""
    from auto_round.formats import format_name
    from auto_round.formats.writer import parse_size

    if options.max_shard_size is not None:
        try:
            parse_size(options.max_shard_size)
        except ValueError as error:
            raise UsageError(str(error)) from error
    return ",".join(map(format_name, comma_list(options.format))) or None


def _run_tasks(folder: str, tasks: list[str], options: argparse.Namespace, device: str) -> None:
    from auto_round.cli.summary import print_pairs
    from auto_round.eval.harness import run_tasks

    trusted = getattr(options, "trust_remote_code", False)
    found = run_tasks(
        folder, tasks, options.eval_bs or "auto", options.limit, options.num_fewshot, device, trust_remote_code=trusted
    )
    rows = [
        (f"{task} {metric}", f"{value:.4f}") for task, metrics in found.items() for metric, value in metrics.items()
    ]
    print_pairs(f"Tasks on {folder}", rows)
