"""The command line: what it answers at once, how it merges options, and one clear sentence for every bad input."""

import inspect
import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_llama

from auto_round import AutoRound, __version__
from auto_round import autoround as front_door
from auto_round.algorithms import ALGORITHMS
from auto_round.cli import demo, listing
from auto_round.cli import main as cli
from auto_round.cli.main import main
from auto_round.cli.parser import UsageError, layer_config
from auto_round.cli.quantize import _ACCEPTED, _OWN, ABSENT, make_parser, settings_for
from auto_round.compressors import verifying
from auto_round.compressors.base import Compressor
from auto_round.formats import FORMATS
from auto_round.schemes import FIELD_NAMES, PRESET_SCHEMES
from auto_round.settings import RECIPES

ROUND = ("--iters", "0", "--disable_opt_rtn", "--group_size", "32")
TUNE = ("--iters", "1", "--nsamples", "4", "--seqlen", "32", "--group_size", "32")


@pytest.fixture(autouse=True)
def loggers():
    """The command configures loggers of the whole process; other tests in it should not notice."""
    found = [logging.getLogger(name) for name in ("auto_round", "transformers")]
    saved = [(log, log.level, log.handlers[:], log.propagate) for log in found]
    yield
    for log, level, handlers, propagate in saved:
        log.level, log.handlers, log.propagate = level, handlers, propagate


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def fails(capsys, code: int, *arguments) -> str:
    """Run the command; it must end with that code and one line on standard error, which is returned."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("auto-round: ")]
    assert len(lines) == 1 and error.rstrip().endswith(lines[0])
    assert "Traceback" not in error
    return lines[0].removeprefix("auto-round: ")


def nothing_written(out) -> bool:
    """Nothing that could be taken for a model: at most a work folder."""
    return not list(out.rglob("config.json"))


# ---- what needs no model ------------------------------------------------------------------------------------------


def test_help_and_list_import_no_heavy_library():
    code = (
        "import sys\nfrom auto_round.cli.main import main\n"
        "for line in '', '--help', 'help quantize', 'quantize --help', 'list', '--version', 'm --iterz 1':\n"
        "    main(line.split())\n"
        "print('HEAVY', [m for m in ('torch', 'transformers', 'numpy', 'safetensors') if m in sys.modules])"
    )
    root = os.path.dirname(os.path.dirname(inspect.getfile(cli)))
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.path.dirname(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "HEAVY []" in found.stdout, found.stdout + found.stderr
    assert "--iters" in found.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help(capsys, arguments):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_commands(capsys, command):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"auto-round {command}" in shown and "--debug" in shown
    assert main(["help", command]) == 0
    assert capsys.readouterr().out == shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"auto-round {__version__}"


def test_list(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*PRESET_SCHEMES, *FORMATS, *RECIPES, *ALGORITHMS))
    assert main(["list", "alg", "rtn"]) == 0
    shown = capsys.readouterr().out
    assert "rounds to nearest" in shown and "signround" not in shown
    assert main(["--list", "format"]) == 0
    assert "auto_round:auto_awq" in capsys.readouterr().out
    assert main(["list", "backends"]) == 0
    assert "torch" in capsys.readouterr().out


def test_list_describes_exactly_what_there_is():
    assert set(listing.FORMAT_NOTES) == set(FORMATS)
    assert set(listing.ALGORITHM_NOTES) == set(ALGORITHMS)


def test_list_mistakes(capsys):
    assert "did you mean 'schemes'" in fails(capsys, 2, "list", "shemes")
    assert "no format 'gguf'" in fails(capsys, 2, "list", "format", "gguf")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["m", "--group_sise", "32"], "unknown argument --group_sise; did you mean --group_size?"),
        (["m", "--iterations=3"], "unknown argument --iterations; did you mean --iters?"),
        (["eval", "m", "--agianst", "o"], "did you mean --against?"),
        (["m", "--scale_dtype", "fp16"], "--scale_dtype is not part of this version"),
        (["m", "n"], "unexpected argument 'n'"),
        (["m", "--iters", "many"], "--iters: invalid whole number value: 'many'"),
        (["m", "--bits", "3.5"], "bits=3.5 is an average: give the schemes to choose from"),
        (["m", "--iters"], "--iters: expected one argument"),
        (["m", "--model_dtype", "fp8"], "invalid choice: 'fp8'"),
        (["m", "--enable_opt_rtn", "--disable_opt_rtn"], "not allowed with argument"),
        (["m", "--alg", "awq"], "unknown algorithm 'awq': known are rtn, signround"),
        (["m", "--model", "n"], "give one model"),
        (["--bits", "4"], "give one model"),
        (["evla", "m"], "did you mean `auto-round eval`?"),
        (["verify"], "give the folder"),
        (["export", "w"], "--output_dir"),
        (["eval"], "give one model folder"),
        (["eval", "m", "--windows", "0"], "must be at least 1"),
    ],
)
def test_usage_errors(capsys, arguments, expected):
    assert expected in fails(capsys, 2, *arguments)


def test_options_known_elsewhere_are_not_ours():
    known = make_parser()._option_string_actions
    assert not [option for option in ABSENT if option in known]


# ---- options ------------------------------------------------------------------------------------------------------


def settings(*arguments: str, recipe: str = "default") -> dict:
    return settings_for(make_parser(recipe).parse(["model", *arguments]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_fill_only_what_is_unset(recipe):
    assert settings(recipe=recipe) == settings("--recipe", recipe) == RECIPES[recipe]
    assert settings("--iters", "7", "--nsamples", "3", recipe=recipe) == {
        **RECIPES[recipe],
        "iters": 7,
        "nsamples": 3,
    }
    assert settings("--enable_opt_rtn", recipe=recipe)["disable_opt_rtn"] is False


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--bits 3.0 --group-size -1 --asym", {"bits": 3, "group_size": -1, "sym": False}),
        ("--scheme=W2A16G32 --fp_layers a,b", {"scheme": "W2A16G32", "ignore_layers": "a,b"}),
        ("--train_bs 4 --seq_len 64 --nsample 2", {"batch_size": 4, "seqlen": 64, "nsamples": 2}),
        ("--device 0,1 --disable_amp", {"device_map": "0,1", "amp": False}),
        ("--no-quant_lm_head", {"quant_lm_head": False}),
        (
            "--disable_minmax_tuning --disable_quanted_input",
            {"enable_minmax_tuning": False, "enable_quanted_input": False},
        ),
        ("--no-enable_minmax_tuning", {"enable_minmax_tuning": False}),
        ("--enable_torch_compile --algs sign_round", {"enable_torch_compile": True, "algorithm": "signround"}),
        ("--minmax_lr 0 --lr 0.01", {"minmax_lr": 0.0, "lr": 0.01}),
        ("--disable_trust_remote_code --platform hf --disable_low_cpu_mem_usage --debug", {"low_cpu_mem_usage": False}),
        ("--trust_remote_code", {"trust_remote_code": True}),
    ],
)
def test_options_become_arguments(arguments, expected):
    assert settings(*arguments.split()) == {"iters": 200, **expected}


def test_model_may_stand_anywhere():
    for line in ("m --bits 4 --asym", "--bits 4 m --asym", "--bits 4 --asym m"):
        assert make_parser().parse(line.split()).model == "m"


def test_every_option_is_an_argument_of_the_factory():
    lists = (FIELD_NAMES, front_door._TUNE, front_door._ATTENTION, front_door._OWN)
    known = {*inspect.signature(AutoRound.__new__).parameters, *(name for names in lists for name in names)}
    dests = {action.dest for action in make_parser()._actions} - {"help", *_OWN, *_ACCEPTED}
    assert dests <= known


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{k_proj:{bits:8},lm_head:W8A16}", {"k_proj": {"bits": 8}, "lm_head": "W8A16"}),
        ('{"k_proj": {"bits": 8, "sym": false}}', {"k_proj": {"bits": 8, "sym": False}}),
        ("{'mlp.*_proj' : {bits: 3, sym: False,},}", {"mlp.*_proj": {"bits": 3, "sym": False}}),
        (
            "{model.layers.0: {group_size: -1, data_type: int}}",
            {"model.layers.0": {"group_size": -1, "data_type": "int"}},
        ),
        ("{ a : null , '1': x1 , b: 0.5 }", {"a": None, "1": "x1", "b": 0.5}),
        ('{"layers.[0-3]": {scheme: "W2A16G32"}}', {"layers.[0-3]": {"scheme": "W2A16G32"}}),
        ("{}", {}),
    ],
)
def test_lenient_rules(text, expected):
    assert layer_config(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "value is expected at position 1"),
        ("k_proj", "is not a mapping"),
        ("[1]", "is not a mapping"),
        ("{k_proj:{bits:8}", "a comma or a closing brace is expected at position 17"),
        ("{k_proj 8}", "a colon after 'k_proj'"),
        ("{k_proj:}", "a value is expected at position 9"),
        ("{a:1}}", "something follows the last brace"),
        ("{a:1, a:2}", "'a' is given twice"),
        ("{'a:1}", "open quote at position 2"),
        ("{:1}", "a name is expected"),
    ],
)
def test_rules_that_cannot_be_read(text, expected):
    with pytest.raises(UsageError) as error:
        layer_config(text)
    assert expected in str(error.value)


def test_rules_from_a_file(tmp_path):
    (tmp_path / "rules.json").write_text('{"k_proj": {"bits": 8}}')
    assert layer_config(str(tmp_path / "rules.json")) == {"k_proj": {"bits": 8}}


# ---- bad input: one sentence, the right code, nothing left behind ---------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--scheme", "W4A61"], "unknown scheme 'W4A61'; did you mean 'W4A16'?"),
        (["--bits", "9"], "bits=9 is not supported"),
        (["--format", "auto_rond"], "unknown format 'auto_rond'; did you mean 'auto_round'?"),
        (["--format", "auto_round:auto_awq", "--bits", "3"], "holds 4-bit layers only"),
        (["--ignore_layers", "k_prj"], "'k_prj' matches no layer; nearest: k_proj"),
        (["--layer_config", "{k_prj:{bits:8}}"], "'k_prj' matches no layer; nearest: k_proj"),
        (["--layer_config", "{k_proj:{bit:8}}"], "unknown scheme field 'bit'; did you mean 'bits'?"),
        (["--to_quant_block_names", "modl.layers"], "'modl.layers' matches no layer"),
        (["--max_shard_size", "5ZB"], "'5ZB' is not a number of bytes"),
        (["--iters", "-3"], "iters=-3 must be a whole number of at least 0"),
        (["--iters", "1", "--dataset", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--tasks", "piqa"], "pip install"),
    ],
)
def test_bad_arguments(capsys, monkeypatch, tiny_dir, out, arguments, expected):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    assert expected in fails(capsys, 2, tiny_dir, *ROUND, "--output_dir", out, *arguments)
    assert nothing_written(out)


def test_empty_data(capsys, tiny_dir, tmp_path, out):
    (tmp_path / "empty.txt").write_text("")
    line = fails(capsys, 2, tiny_dir, *TUNE, "--output_dir", out, "--dataset", tmp_path / "empty.txt")
    assert "holds no text" in line and nothing_written(out)


def test_missing_tokenizer(capsys, tmp_path, out):
    folder = save_tiny(tiny_llama(), tmp_path / "untold", tokenizer=False)
    assert "has no tokenizer" in fails(capsys, 2, folder, *TUNE, "--output_dir", out)
    assert nothing_written(out)
    assert main([str(folder), *ROUND, "--output_dir", str(out)]) == 0  # plain rounding reads no text


@pytest.fixture
def shards(tmp_path):
    """A model in several files, and one of them."""
    folder = save_tiny(tiny_llama(), tmp_path / "sharded", shard="60KB")
    return folder, sorted(folder.glob("*.safetensors"))[1]


def damage_missing(file):
    file.unlink()


def damage_truncated(file):
    file.write_bytes(file.read_bytes()[:-100])


def damage_garbage(file):
    file.write_bytes(b"<html>not found</html>")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (damage_missing, "is missing"),
        (damage_truncated, "is truncated"),
        (damage_garbage, "truncated or no safetensors"),
    ],
)
def test_damaged_shards(capsys, shards, out, damage, expected):
    folder, file = shards
    damage(file)
    line = fails(capsys, 1, folder, *ROUND, "--output_dir", out)
    assert expected in line and file.name in line and "download it again" in line
    assert nothing_written(out)


@pytest.mark.parametrize("how", [ROUND, TUNE], ids=["rounded", "tuned"])
def test_weights_that_are_not_numbers(capsys, tiny_dir, out, how):
    weights = load_file(tiny_dir / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, tiny_dir / "model.safetensors", {"format": "pt"})
    line = fails(capsys, 1, tiny_dir, *how, "--output_dir", out)
    assert "model.layers.1.mlp.up_proj.weight holds NaN or Inf" in line and nothing_written(out)


def test_pickled_weights(capsys, tiny_dir, out):
    (tiny_dir / "model.safetensors").unlink()
    torch.save({}, tiny_dir / "pytorch_model.bin")
    line = fails(capsys, 1, tiny_dir, *ROUND, "--output_dir", out)
    assert "pickled weights only" in line and "convert them first" in line


def test_no_model_folder(capsys, tmp_path, out):
    assert "does not exist" in fails(capsys, 1, tmp_path / "nowhere", "--output_dir", out)
    assert not out.exists()


def test_output_that_cannot_be_written(capsys, tiny_dir, tmp_path):
    (tmp_path / "file").write_text("")
    line = fails(capsys, 1, tiny_dir, *ROUND, "--output_dir", tmp_path / "file" / "out")
    assert "cannot be written" in line and "choose another" in line


def test_full_disk(capsys, monkeypatch, tiny_dir, out):
    usage = shutil.disk_usage(tiny_dir)._replace(free=1000)
    monkeypatch.setattr("auto_round.formats.writer.shutil.disk_usage", lambda path: usage)
    assert "make room" in fails(capsys, 1, tiny_dir, *ROUND, "--output_dir", out)
    assert nothing_written(out)


def test_failed_check(capsys, monkeypatch, tiny_dir, out):
    monkeypatch.setattr(verifying, "codes_problem", lambda *a: "layer 7 is not what it was")
    line = fails(capsys, 1, tiny_dir, *ROUND, "--output_dir", out)
    assert "reloaded = quantized" in line and "layer 7 is not what it was" in line
    assert not (out / "tiny-w4g32").exists()


def raising(error: BaseException):
    def raise_it(*args, **kwargs):
        raise error

    return raise_it


def test_interrupt(capsys, monkeypatch, tiny_dir, out):
    monkeypatch.setattr(Compressor, "quantize_and_save", raising(KeyboardInterrupt()))
    line = fails(capsys, 130, tiny_dir, *ROUND, "--output_dir", out)
    assert line == "interrupted; the same command goes on from the last finished block"


def test_unforeseen_error(capsys, monkeypatch, tiny_dir, out):
    monkeypatch.setattr(Compressor, "quantize_and_save", raising(ZeroDivisionError("by\nzero")))
    line = fails(capsys, 1, tiny_dir, *ROUND, "--output_dir", out)
    assert line == "ZeroDivisionError: by zero (run again with --debug for the traceback)"
    assert main([str(tiny_dir), *ROUND, "--output_dir", str(out), "--debug"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "--debug for" not in error.splitlines()[-1]


def test_unknown_argument_of_the_factory_is_usage(capsys, monkeypatch, tiny_dir):
    monkeypatch.setattr("auto_round.cli.quantize.settings_for", lambda options: {"ignor_layers": "a"})
    assert "unknown argument 'ignor_layers'; did you mean 'ignore_layers'?" in fails(capsys, 2, tiny_dir)


# ---- whole runs ---------------------------------------------------------------------------------------------------


def test_quantize_then_check_evaluate_and_damage(capsys, tiny_dir, out):
    assert main([str(tiny_dir), *TUNE, "--output_dir", str(out), "--ignore_layers", "layers.1.mlp"]) == 0
    shown = capsys.readouterr().out
    folder = out / "tiny-w4g32"
    assert "Quantized 11/14 layers" in shown and "ignore_layers 'layers.1.mlp'" in shown
    assert "KL " in shown and "peak memory" in shown and "from_pretrained(" in shown
    assert (folder / "report.html").is_file()
    assert json.loads((folder / "report.json").read_text())["quantized_layers"] == [11, 14]

    assert main(["verify", str(folder), "--against", str(tiny_dir)]) == 0
    shown = capsys.readouterr().out
    assert "passed" in shown and "FAILED" not in shown and "KL" in shown

    arguments = [str(folder), "--against", str(tiny_dir), "--windows", "2", "--seqlen", "32", "--device", "cpu"]
    assert main(["eval", *arguments]) == 0
    assert "top-1 agreement" in capsys.readouterr().out

    (folder / "NOTICE.txt").write_text("changed")
    assert main(["verify", str(folder)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_several_formats_and_scripts(capsys, monkeypatch, tiny_dir, out):
    arguments = ["auto-round-rtn", str(tiny_dir), "--group_size", "32", "--formats", "auto-round,fake"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output_dir", str(out)])
    assert cli.main_rtn() == 0
    shown = capsys.readouterr().out
    for name in ("auto-round", "fake"):
        folder = out / "tiny-w4g32" / name
        assert (folder / "config.json").is_file() and str(folder) in shown.replace("\n", "")
    report = json.loads((folder / "report.json").read_text())
    assert report["settings"]["iters"] == 0 and not report["settings"].get("search", True)


@pytest.mark.parametrize("name", ["main_best", "main_light", "main_opt_rtn", "main_rtn"])
def test_scripts_have_their_recipe(monkeypatch, name):
    seen = {}

    def fake(arguments, recipe="default"):
        seen.update(arguments=arguments, recipe=recipe)
        return 0

    monkeypatch.setattr("auto_round.cli.quantize.run", fake)
    monkeypatch.setattr(sys, "argv", [name, "m", "--bits", "4"])
    assert getattr(cli, name)() == 0
    assert seen == {"arguments": ["m", "--bits", "4"], "recipe": name.removeprefix("main_")}


def test_export_of_an_earlier_run(capsys, tiny_dir, out, tmp_path):
    assert main([str(tiny_dir), *ROUND, "--output_dir", str(out)]) == 0
    folder = out / "tiny-w4g32"
    work = json.loads((folder / "report.json").read_text())["work_folder"]
    for index, source in enumerate((folder, work, os.path.dirname(work))):
        target = tmp_path / f"export{index}"
        assert main(["export", str(source), "--format", "fake", "--output_dir", str(target)]) == 0
        assert list(target.rglob("config.json"))
    capsys.readouterr()
    shutil.rmtree(work)
    assert "is gone" in fails(capsys, 2, "export", folder, "--output_dir", tmp_path / "late")
    assert "no work folder" in fails(capsys, 2, "export", tmp_path, "--output_dir", tmp_path / "late")


def test_demo(capsys, tiny_dir, out):
    arguments = ["--model", tiny_dir, "--output_dir", out, "--iters", 1, "--nsamples", 4, "--seqlen", 32]
    assert main(["demo", *map(str, arguments)]) in (0, 1)  # one step on a random model says nothing about tuning
    shown = capsys.readouterr().out
    for name, folder, _ in demo.ROWS:
        assert name in shown and list((out / folder).glob("tiny-*/report.html"))
    assert "original" in shown and "peak memory" in shown


def test_demo_fails_when_tuning_does_not_help():
    def row(kl: float, perplexity: float) -> demo.Row:
        return demo.Row("x", perplexity, "", 0, kl)

    assert demo._verdict([row(0.2, 30.0), row(0.1, 29.0)]) == 0
    assert demo._verdict([row(0.2, 30.0), row(0.2, 29.0)]) == 1
    assert demo._verdict([row(0.2, 30.0), row(float("nan"), 29.0)]) == 1
