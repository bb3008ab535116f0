"""The report says what a result depends on, and the command in it gives the same bytes again."""

import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mishaps import content
from tiny import save_tiny, tiny_llama, token_ids

from auto_round import AutoRound
from auto_round.cli.main import main
from auto_round.cli.quantize import make_parser, settings_for
from auto_round.command import command_line
from auto_round.schemes import parse_scheme

TUNE = {"iters": 4, "lr": 0.03, "nsamples": 4, "seqlen": 32, "group_size": 32, "show_progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a folder's name") / "tiny"
    return save_tiny(tiny_llama(), folder)


@pytest.fixture(scope="module")
def text(model):
    file = model.parent / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 200)
    return file


def report(folder):
    return json.loads((Path(folder) / "report.json").read_text())


def repeat(folder, other):
    """Run the recorded command with another output; returns the folder that it makes."""
    words = shlex.split(report(folder)["command"])
    assert words[0] == "auto-round"
    place = next(index for index, word in enumerate(words) if word.startswith("--output_dir="))
    words[place] = f"--output_dir={other}"
    assert main(words[1:]) == 0
    return other / Path(folder).name


def test_a_command_is_repeated(model, text, tmp_path, monkeypatch):
    monkeypatch.chdir(text.parent)
    line = f"--dataset text.txt --iters 4 --lr 0.03 --nsamples 4 --seqlen 32 --bits 3 --group-size 32 --asym --seed 3 \
        --layer_config {{o_proj:{{bits:8}}}} --output_dir={tmp_path / 'one'}"
    assert main(["quantize", "tiny", *line.split()], recipe="light") == 0
    folder = tmp_path / "one/tiny-w3g32"
    monkeypatch.chdir(tmp_path)
    assert content(repeat(folder, tmp_path / "two")) == content(folder)
    assert report(folder)["settings"]["seed"] == 3


def test_a_call_is_repeated_by_a_command(model, text, tmp_path):
    arguments = {**TUNE, "dataset": str(text), "sym": False, "layer_config": {"layers.1.*": {"bits": 2}}, "seed": 5}
    _, folder = AutoRound(str(model), **arguments, ignore_layers=["k_proj"]).quantize_and_save(tmp_path / "one")
    assert content(repeat(folder, tmp_path / "two")) == content(folder)


def test_a_call_with_objects_is_repeated_by_its_program(model, tmp_path, monkeypatch):
    """No option holds tensors, so the program itself is what is recorded, with the folder that it ran in."""
    program = tmp_path / "my program.py"
    program.write_text(
        "import sys, torch\ntorch.set_num_threads(1)\nfrom auto_round import AutoRound\n"
        f"ids = [torch.arange(3, 35)[None] for _ in range(4)]\nAutoRound({str(model)!r}, dataset=ids, **{TUNE!r})"
        ".quantize_and_save(sys.argv[1])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, program.name, "one out"])
    monkeypatch.setattr(sys, "argv", [program.name, "one out"])
    runpy.run_path(program.name)
    folder = tmp_path / "one out/tiny-w4g32"
    before, said = content(folder), report(folder)["command"]
    again = said.replace("one out", "two out")
    subprocess.run(again, shell=True, check=True, capture_output=True, cwd="/")
    assert content(tmp_path / "two out/tiny-w4g32") == before


EQUAL = [
    {"bits": 4, "group_size": 128, "sym": True},
    {"scheme": "MXFP4", "act_bits": 16},
    {"iters": 0, "disable_opt_rtn": True},
    {"iters": 0, "disable_opt_rtn": False, "quant_lm_head": True},
    {"group_size": -1, "enable_minmax_tuning": False, "enable_quanted_input": False, "amp": False},
    {"engine": "vllm", "ignore_layers": "a,b", "device_map": "cpu", "trust_remote_code": True},
    {"lr": 0.005, "momentum": 0.0, "model_dtype": "float32", "not_use_best_mse": True, "batch_size": 2},
    {"static_kv_dtype": "fp8", "static_kv_granularity": "head", "quant_nontext_module": False},
    {"layer_config": {"k_proj": {"bits": 8, "sym": False}, "lm_head": "W8A16"}, "to_quant_block_names": "layers"},
    {"enable_adam": True, "max_memory": "4GiB", "low_cpu_mem_usage": False},
    {"enable_adam": False, "max_memory": "cpu=4GiB,0=20GiB"},
    {"algorithm": "rtn", "low_gpu_mem_usage": True, "enable_torch_compile": False, "act_dynamic": False},
]


@pytest.mark.parametrize("asked", EQUAL, ids=[" ".join(asked) for asked in EQUAL])
def test_the_command_means_the_call(asked, tmp_path):
    words = shlex.split(command_line({"model": "m", **asked}, tmp_path, ["auto_round", "fake"], "5GB", True))
    options = make_parser().parse(words[1:])
    found = settings_for(options)
    assert {name: found.get(name) for name in asked} == asked
    assert not found.keys() - asked.keys() - {"iters"}
    assert (options.model, options.output_dir, options.format) == ("m", str(tmp_path), "auto_round,fake")
    assert options.max_shard_size == "5GB" and options.force


def test_memories_by_name(tmp_path):
    words = shlex.split(command_line({"model": "m", "max_memory": {"cpu": "4GiB", 0: 9}}, tmp_path, ["fake"]))
    assert make_parser().parse(words[1:]).max_memory == "cpu=4GiB,0=9"


@pytest.mark.parametrize(
    "asked",
    [{"dataset": token_ids(1)}, {"tokenizer": object()}, {"scheme": parse_scheme("W4A16")}, {"group_size": (128, 128)}],
)
def test_what_no_command_can_say(asked, tmp_path):
    assert command_line({"model": "m", **asked}, tmp_path, ["auto_round"]) is None
    assert command_line({"model": torch.nn.Linear(1, 1)}, tmp_path, ["auto_round"]) is None
    assert command_line(None, tmp_path, ["auto_round"]) is None


def test_what_a_report_holds(model, tmp_path):
    run = AutoRound(str(model), dataset=token_ids(4), **TUNE)
    _, folder = run.quantize_and_save(tmp_path)
    found = report(folder)
    assert {"python", "system", "processor", "instructions", "threads", "device"} <= found["machine"].keys()
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert {"torch", "transformers", "safetensors", "tokenizers", "accelerate", "numpy"} <= found["versions"].keys()
    assert found["source"] == run.streamed.checkpoint.fingerprint()
    assert found["settings"]["seed"] == 42 and len(found["data"]["sha256"]) == 64
