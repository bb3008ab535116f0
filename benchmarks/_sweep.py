"""One type of the architecture sweep, from its configuration to the comparison of logits (see architectures.py)."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

GROUP, BITS = 32, 4
BATCH, LENGTH, SAMPLES = 4, 32, 8
COVERAGE, SLOPE, SLACK = 0.95, 2.5, 0.02
ABSURD = 1e4  # some classes mask columns of the logits with the least number of the dtype

# 2-D parameters that are no matrices of a product: decay rates, tables of positions, shifts.
NO_MATRIX = re.compile(r"(^|\.)(A_log|(\w+_)?embed\w*|w[tp]e|lm_heads?|\w*norm\w*|\w*position\w*|\w*_table)(\.|$)")

ROUTER = re.compile(r"\.(router\w*|gate)\.\w+\.")  # a layer of a router that has several

# Blocks of what is no text: they run where a class cannot be given text alone, and are not quantized by default.
TOWER = re.compile(r"vision|visual|image|audio|qformer")

# Default configurations that their own class refuses.
DEFAULTS: dict[str, dict[str, Any]] = {}

KINDS = {  # kind: (the mapping in modeling_auto, the auto class)
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "itt": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
    "mm": ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "AutoModelForMultimodalLM"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "speech": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "AutoModelForSpeechSeq2Seq"),
}

Report = Callable[..., None]


def entries() -> list[tuple[str, str]]:
    """Every (kind, model type); the multimodal table repeats the image one, whose types count there only."""
    from transformers.models.auto import modeling_auto

    found = [(kind, t) for kind, (mapping, _) in KINDS.items() for t in getattr(modeling_auto, mapping)]
    images = {t for kind, t in found if kind == "itt"}
    return [(kind, t) for kind, t in found if kind != "mm" or t not in images]


def make(kind: str, model_type: str, zoo: Path | None) -> Any:
    """The tiny model of an entry: of the zoo's configuration if it has one, else of the shrunken default."""
    import transformers
    from transformers import CONFIG_MAPPING

    from auto_round.doctor.tiny import build, tiny_model

    auto = getattr(transformers, KINDS[kind][1])
    file = zoo / f"{kind}__{model_type}.json" if zoo else None
    if file and file.is_file():
        return build(CONFIG_MAPPING[model_type].from_dict(json.loads(file.read_text())["config"]), auto)
    return tiny_model(CONFIG_MAPPING[model_type](**DEFAULTS.get(model_type, {})), auto)


def run_entry(kind: str, model_type: str, options: Any, report: Report) -> None:
    """Run one entry; `report(**fields)` takes what is known as soon as it is known, `stage` before each step."""
    from auto_round.doctor.tiny import text_batch

    report(stage="build")
    model = make(kind, model_type, options.zoo)
    report(**{"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())})
    batch = text_batch(model)
    blocks = executed_blocks(model, batch)
    logits = logits_of(model, batch)
    report(inputs=sorted(batch), odd=odd_shapes(model))
    if not torch.isfinite(logits).all():
        raise ValueError("the logits of the tiny model are not finite")
    if logits.norm() == 0:
        raise ValueError("the logits of the tiny model are all zero")
    if options.build_only:
        report(status="ok")
        return
    report(structural=by_structure(model.config))
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        report(stage="save")
        model.save_pretrained(f"{folder}/model")
        if hasattr(model, "talker"):
            torch.save({}, f"{folder}/model/spk_dict.pt")
        model, logits = reloaded_original(model, f"{folder}/model", batch, logits)
        report(stage="quantize")
        artifact = quantize(Path(folder), calibration(model), options.iters)
        report(stage="reload")
        reloaded = type(model).from_pretrained(artifact, dtype="auto").eval()
        report(stage="compare")
        compare(model, reloaded, blocks, batch, logits, artifact, report)


def reloaded_original(model: Any, folder: str, batch: Any, logits: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """The original as Transformers loads it: some classes compute parameters instead of storing them."""
    stored = type(model).from_pretrained(folder, dtype="auto").eval()
    found = logits_of(stored, batch)
    computed = any(getattr(m, "_keys_to_ignore_on_save", None) for m in model.modules())
    if distance(found, logits) > 1e-3 and not computed:
        raise ValueError("Transformers itself does not reload what it saved: the logits differ")
    return stored, found


def calibration(model: Any) -> list[Any]:
    """Samples of ids [1, 32], or dictionaries of what the forward takes where it takes something else than that."""
    from auto_round.doctor.tiny import text_batch, token_ids

    sample = text_batch(model, 1, LENGTH)
    if sample.keys() <= {"input_ids", "decoder_input_ids"} and sample["input_ids"].shape == (1, LENGTH):
        generator = torch.Generator().manual_seed(1)
        return [token_ids(model, 1, LENGTH, generator) for _ in range(SAMPLES)]
    return [text_batch(model, 1, LENGTH, seed) for seed in range(1, SAMPLES + 1)]


def quantize(folder: Path, dataset: list[Any], iters: int) -> Path:
    from auto_round import AutoRound

    rounder = AutoRound(
        str(folder / "model"),
        scheme="W4A16",
        group_size=GROUP,
        iters=iters,
        dataset=dataset,
        nsamples=SAMPLES,
        seqlen=LENGTH,
        batch_size=BATCH,
        device_map="cpu",
        show_progress=False,
    )
    _, out = rounder.quantize_and_save(str(folder / "quantized"))
    return Path(out)


def compare(
    model: Any, reloaded: Any, blocks: list[str], batch: Any, logits: torch.Tensor, folder: Path, report: Report
) -> None:
    """Judge the reloaded artifact: how much of the weights it stores quantized, and how far its logits are."""
    weights = block_weights(model, blocks)
    fraction = stored_elements(folder) / max(1, sum(p.numel() for p, _ in weights.values()))
    error = distance(logits_of(reloaded, batch), logits)
    rounded_to_nearest(weights)
    bound = distance(logits_of(model, batch), logits)
    report(fraction=round(fraction, 4), error=round(error, 4), bound=round(bound, 4))
    if fraction < COVERAGE:
        report(status="wrong: coverage", cause=f"{fraction:.0%} stored; left: {unstored(folder, weights)}")
    elif not error <= SLOPE * bound + SLACK:
        report(status="wrong: error", cause=f"error {error:.3f}, round-to-nearest has {bound:.3f}")
    else:
        report(status="ok")


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of a batch, masked columns as zeros."""
    from auto_round.doctor.tiny import text_module

    batch = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
    torch.manual_seed(0)
    with torch.no_grad():
        out = text_module(model)(**batch)
    logits = getattr(out, "logits", None)
    logits = (out[0] if logits is None else logits).float()
    return torch.where(logits.abs() > ABSURD, torch.zeros_like(logits), logits)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def executed_blocks(model: Any, batch: Any) -> list[str]:
    """The names of the outermost elements of module lists that a forward of the batch runs through."""
    lists = [n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    outer = [
        n
        for n in lists
        if not any(n.startswith(f"{other}.") for other in lists) and not NO_MATRIX.search(n.split(".")[-1])
    ]
    seen: set[str] = set()
    handles = []
    for name in outer:
        for index, block in enumerate(model.get_submodule(name)):
            inner = [m for m in block.modules() if next(m.parameters(False), None) is not None] or [block]
            for module in inner:  # a list in a list is never called itself, its parts are
                handles.append(module.register_forward_pre_hook(lambda *_, n=f"{name}.{index}": seen.add(n)))
    logits_of(model, batch)
    for handle in handles:
        handle.remove()
    return sorted(seen)


def block_weights(model: Any, blocks: list[str]) -> dict[str, tuple[torch.nn.Parameter, int]]:
    """The matrices of the blocks, each with the dimension that runs over its input: {name: (weight, dimension)}."""
    experts = {m.num_experts for m in model.modules() if isinstance(getattr(m, "num_experts", None), int)}
    found: dict[str, tuple[torch.nn.Parameter, int]] = {}
    for path, module in model.named_modules():
        block = next((b for b in blocks if f"{path}.".startswith(f"{b}.")), None)
        if block is None or (TOWER.search(path) and not model.config.is_encoder_decoder):
            continue
        if isinstance(module, (torch.nn.Embedding, torch.nn.modules.conv._ConvNd)):
            continue
        turned = type(module).__name__ == "Conv1D" or bool(getattr(module, "is_transposed", False))
        for name, weight in module.named_parameters(path, recurse=False):
            router = weight.dim() == 2 and (len(weight) in experts or bool(ROUTER.search(name)))
            linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
            matrix = weight.dim() in (2, 3) and weight.is_floating_point() and min(weight.shape[-2:]) >= GROUP
            shared = any(weight is known for known, _ in found.values())
            if matrix and not router and not shared and (linear or not NO_MATRIX.search(name[len(block) :])):
                found[name] = (weight, weight.dim() - (2 if turned else 1))
    return found


def rounded_to_nearest(weights: dict[str, tuple[torch.nn.Parameter, int]]) -> None:
    """Round weights in place, symmetrically over the full range: the largest of each group of 32 becomes -8."""
    for weight, dimension in weights.values():
        moved = weight.data.movedim(dimension, -1)
        size = GROUP if moved.shape[-1] % GROUP == 0 else moved.shape[-1]
        groups = moved.reshape(-1, size)
        largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
        scale = torch.where(largest == 0, torch.ones_like(largest), -largest / 2 ** (BITS - 1))
        rounded = (groups / scale).round().clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1) * scale
        weight.data.copy_(rounded.reshape(moved.shape).movedim(-1, dimension))


def stored(folder: Path) -> dict[str, int]:
    """{name of a quantized matrix in an artifact: its number of elements}."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a file, not a mapping)
                if name.endswith(".qweight"):
                    shape = tensors.get_slice(name).get_shape()
                    found[name] = int(torch.Size(shape).numel()) * 32 // int(config.get("bits", BITS))
    return found


def stored_elements(folder: Path) -> int:
    return sum(stored(folder).values())


def unstored(folder: Path, weights: dict[str, Any]) -> str:
    """Some weights whose last two names no quantized matrix has: a hint, since names may change on saving."""
    tails = {".".join(n.split(".")[-3:-1]) for n in stored(folder)}
    left = [n for n in weights if ".".join(n.removesuffix(".weight").split(".")[-2:]) not in tails]
    return ", ".join(dict.fromkeys(re.sub(r"\d+", "N", n) for n in left[:40])) or "unknown"


def odd_shapes(model: Any) -> list[str]:
    """2-D weights of the text part with a dimension that is no multiple of 32."""
    text = {n: p for n, p in model.named_parameters() if not re.search("vis|audio|image|codec|speech|qformer", n)}
    odd = {
        re.sub(r"\d+", "N", n): list(p.shape)
        for n, p in text.items()
        if p.dim() == 2 and any(size % GROUP for size in p.shape)
    }
    return [f"{name} {shape}" for name, shape in odd.items()][:6]


def by_structure(config: Any) -> bool:
    """Whether none of auto_round's tables has an entry for the type or for one of the types nested in it."""
    from auto_round import special_model_handler
    from auto_round.doctor.tiny import levels
    from auto_round.modeling.fused_moe.replace_modules import BUILTIN_MODULES

    named = {n: v for n, v in vars(special_model_handler).items() if n.isupper()}
    tables = [v for v in named.values() if isinstance(v, (dict, list, set, tuple))]
    types = {level.model_type for level in levels(config)}
    return not any(types & set(map(str, table)) for table in [*tables, BUILTIN_MODULES])


def timed(run: Callable[[], None], report: Report) -> None:
    """Run, and report the seconds and the exception if there is one."""
    began = time.perf_counter()
    try:
        run()
    except BaseException as e:
        lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [""]
        report(status="failed", cause=f"{type(e).__name__}: {' … '.join(dict.fromkeys((lines[0], lines[-1])))}"[:600])
        raise
    finally:
        report(seconds=round(time.perf_counter() - began, 2))
