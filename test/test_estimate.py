"""Estimates against real runs of tiny models, plans from headers alone, and runs that are refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
from pathlib import Path

import pytest
import torch
from tiny import random_model, save_tiny, tiny_llama

from auto_round import AutoRound
from auto_round.budget import Working
from auto_round.cli.main import main
from auto_round.compressors import afford
from auto_round.compressors.afford import DoesNotFitError, Resources
from auto_round.earlier import earlier_runs
from auto_round.estimate import coverage, memory, needed_samples
from auto_round.modeling.checkpoint import CheckpointError, read_header
from auto_round.modeling.headers import open_headers, write_headers
from auto_round.speed import Glue, LayerShape, Setting, measure
from auto_round.workload import workload

OPTIONS = {"iters": 2, "nsamples": 4, "seqlen": 32, "group_size": 32, "show_progress": False, "device_map": "cpu"}


def cut_to_headers(source: Path, target: Path) -> Path:
    """A copy of a model folder whose weight file ends after its header."""
    target.mkdir()
    for file in source.iterdir():
        data = file.read_bytes()
        if file.suffix == ".safetensors":
            data = data[: 8 + int.from_bytes(data[:8], "little")]
        (target / file.name).write_bytes(data)
    return target


def planned(capsys, *arguments: str) -> tuple[int, dict]:
    code = main(["plan", *arguments, "--json", "--device", "cpu"])
    return code, json.loads(capsys.readouterr().out)


def test_plan_from_headers_is_that_of_the_run(tiny_dir, tmp_path, capsys):
    """Layers, reasons and sizes that the plan tells are those of the run that follows."""
    headers = cut_to_headers(tiny_dir, tmp_path / "headers")
    options = ["--iters", "2", "--nsamples", "4", "--seqlen", "32", "--group_size", "32", "--ignore_layers", "k_proj"]
    code, found = planned(capsys, str(headers), *options)
    assert code == 0 and found["problems"] == []
    run = AutoRound(str(tiny_dir), **OPTIONS, ignore_layers="k_proj")
    _, folder = run.quantize_and_save(tmp_path / "out")
    report = json.loads((Path(folder) / "report.json").read_text())
    assert found["layers"] == report["layers"]
    assert found["quantized_layers"] == report["quantized_layers"]
    written = sum(end.nbytes for end in read_header(Path(folder) / "model.safetensors").values())
    assert found["output_bytes"]["auto_round"] == written
    assert found["estimate"]["disk"]["spill"] == report["estimate"]["disk"]["spill"] == 0
    assert report["estimate"]["ram"]["state"] == found["estimate"]["ram"]["state"] > 0
    stored = sum(file.stat().st_size for file in Path(report["work_folder"]).glob("*.safetensors"))
    assert abs(found["estimate"]["disk"]["work"] / stored - 1) < 0.5  # headers weigh in files so small


def test_every_format_has_its_size(tiny_dir, tmp_path, capsys):
    """Sizes of formats that were not chosen are those planned when they are."""
    _, found = planned(capsys, str(tiny_dir), "--iters", "0", "--group_size", "32")
    for name in ("auto_gptq", "llm_compressor", "mlx"):
        _, chosen = planned(capsys, str(tiny_dir), "--iters", "0", "--group_size", "32", "--format", name)
        assert chosen["estimate"]["disk"]["output"] == {name: found["output_bytes"][name]}


def test_plan_in_words(tiny_dir, capsys):
    assert main(["plan", str(tiny_dir), "--recipe", "rtn", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for part in ("14/14 layers", "model.layers.[0-1]", "outside the blocks", "RAM", "disk", "time", "as auto_round"):
        assert part in text


def test_headers_that_lack_a_tensor(tiny_dir, tmp_path):
    headers = cut_to_headers(tiny_dir, tmp_path / "headers")
    file = headers / "model.safetensors"
    header = json.loads(file.read_bytes()[8:])
    del header["model.layers.1.mlp.up_proj.weight"]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    incomplete = pytest.raises(CheckpointError, match=r"no tensor for 'model.layers.1.mlp.up_proj.weight'")
    with incomplete, open_headers(str(headers), False, None, torch.device("cpu")):
        pass


def test_headers_from_the_hub(tiny_dir, tmp_path):
    """What the hub tells of a file is written as a header that reads back; a name that leads out is refused."""
    header = read_header(tiny_dir / "model.safetensors")
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    tensors = {
        name: types.SimpleNamespace(dtype=names[e.dtype], shape=list(e.shape), data_offsets=(e.begin, e.end))
        for name, e in header.items()
    }
    found = types.SimpleNamespace(
        files_metadata={"model-1.safetensors": types.SimpleNamespace(tensors=tensors)},
        weight_map=dict.fromkeys(tensors, "model-1.safetensors"),
        sharded=True,
    )
    write_headers(tmp_path, found)
    again = read_header(tmp_path / "model-1.safetensors", headers_only=True)
    assert {n: (e.shape, e.dtype) for n, e in again.items()} == {n: (e.shape, e.dtype) for n, e in header.items()}
    with pytest.raises(CheckpointError, match="outside"):
        write_headers(tmp_path, types.SimpleNamespace(files_metadata={"../x": found}, sharded=False))


@pytest.mark.parametrize(("there", "error", "words"), [
    (Resources(ram=0, disk=10**12), DoesNotFitError, "of RAM"),
    (Resources(ram=10**12, disk=1000), OSError, "output's disk has"),
])  # fmt: skip
def test_a_run_that_cannot_fit_is_refused(tiny_dir, tmp_path, monkeypatch, there, error, words):
    monkeypatch.setattr(afford, "resources", lambda folder, device: there)
    run = AutoRound(str(tiny_dir), **OPTIONS)
    with pytest.raises(error, match=words) as caught:
        run.quantize_and_save(tmp_path / "out")
    assert "force=True" in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))
    _, folder = AutoRound(str(tiny_dir), **OPTIONS).quantize_and_save(tmp_path / "out", force=True)
    assert any("by force" in text for text in json.loads((Path(folder) / "report.json").read_text())["warnings"])


def test_advice_makes_it_fit(tiny_dir, monkeypatch):
    """The change of settings that is named does what is promised."""
    run = AutoRound(str(tiny_dir), **{**OPTIONS, "nsamples": 64, "seqlen": 256})
    work = afford.work_of(run)
    monkeypatch.setattr(afford, "resident_bytes", lambda: 0)
    light = dataclasses.replace(work, tune=dataclasses.replace(work.tune, iters=0))
    need = {key: memory(one, 10**6, 0, run.working)[0].total for key, one in (("tuned", work), ("rounded", light))}
    assert need["rounded"] < need["tuned"]
    found = afford.estimate(work, {"auto_round": 10**6}, 0, run.working)
    said, _ = afford.problems(run, work, found, Resources(ram=need["rounded"] + 1, disk=None))
    assert "it fits" in said[0]
    said, _ = afford.problems(run, work, found, Resources(ram=1000, disk=None))
    assert "no setting" in said[0]


def test_every_stage_that_takes_time_is_estimated(tmp_path):
    """How near they are is for benchmarks/estimates.py: a machine that tests side by side is no place to time."""
    folder = save_tiny(tiny_llama(hidden_size=128, intermediate_size=256), tmp_path / "model")
    options = {**OPTIONS, "iters": 5, "nsamples": 8, "seqlen": 128, "scale_iters": 2}
    run = AutoRound(str(folder), **options)
    run.quantize_and_save(tmp_path / "out")
    assert {"calibrate", "tune", "scales", "export", "verify"} <= run.times.keys()
    assert {
        "original",
        "follow",
        "search",
        "judge",
        "steps",
        "scales",
        "export",
        "verify",
    } <= run.estimate.seconds.keys()
    assert all(seconds > 0 for seconds in run.estimate.seconds.values())


def test_errors_of_earlier_estimates(tiny_dir, tmp_path, capsys):
    """Runs whose reports lie in the output folder: the middle of their errors, each run once."""

    def report(folder: str, memory: float, took: float, **changes) -> None:
        estimate = {"ram": {"total": 100 << 20}, "vram": None, "disk": {"output": {"x": 1}}, "total_seconds": 10.0}
        found = {"estimate": estimate, "peak_memory_mb": memory, "times": {"tune": took}, "blocks": [], **changes}
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "report.json").write_text(json.dumps({"work_folder": folder, **found}))

    assert earlier_runs(tmp_path / "nowhere").words() == ""
    report("a", 80, 20)
    report("b", 100, 12.5)
    report("c", 125, 10, blocks=[{"resumed": True}])  # its time is that of a part
    report("c/again", 90, 10, blocks=[{"resumed": True}], work_folder="c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "report.json").write_text("{")
    report("e", 0, 0)
    report("f.partial", 1, 1)
    found = earlier_runs(tmp_path)
    assert found.runs == 3 and found.time == pytest.approx(-0.35) and found.device is None
    assert found.words().startswith("memory +") and found.words().endswith("%, time -35 % (3 runs)")
    planned(capsys, str(tiny_dir), "--iters", "0", "--output_dir", str(tmp_path))
    assert main(["plan", str(tiny_dir), "--iters", "0", "--device", "cpu", "--output_dir", str(tmp_path)]) == 0
    assert "time -35 % (3 runs)" in capsys.readouterr().out


def test_a_budget_is_what_can_be_had(tiny_dir, tmp_path, capsys):
    """A plan and a run are held to `max_memory`, and the plan says how it works within it."""
    code, found = planned(capsys, str(tiny_dir), "--max_memory", "10MB", "--seqlen", "32", "--nsamples", "4")
    assert code == 1 and "of RAM" in found["problems"][0]
    assert (found["working"]["keep"], found["working"]["micro_tokens"]) == ("file", 32)
    with pytest.raises(DoesNotFitError, match="of RAM"):
        AutoRound(str(tiny_dir), **OPTIONS, max_memory={"cpu": "10MB"}).quantize_and_save(tmp_path / "out")
    code, found = planned(
        capsys, str(tiny_dir), "--max_memory", "cpu=90GiB,0=1GiB", "--seqlen", "32", "--nsamples", "4"
    )
    assert (code, found["working"]["halvings"], found["working"]["micro_tokens"]) == (0, 0, 128)


def test_state_grows_with_what_is_kept(tiny_dir):
    adam = {"algorithm": "adamround"}
    changes = ({}, adam, {"momentum": 0.0}, {"not_use_best_mse": True})
    works = [afford.work_of(AutoRound(str(tiny_dir), **OPTIONS, **changed)) for changed in changes]
    usual, more, less, last = (memory(work, 0, 0, Working())[0].state for work in works)
    weights = works[0].blocks[0].quantized
    assert (more - usual, usual - less, usual - last) == (2 * weights, 2 * weights, weights)


def test_experts_are_counted(tmp_path):
    """Tokens per expert, and the samples that would do."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=320,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    folder = save_tiny(random_model(config), tmp_path / "moe")
    with open_headers(str(folder), False, None, torch.device("cpu")) as streamed:
        run = AutoRound(streamed, types.SimpleNamespace(model_max_length=64), **OPTIONS)
        work = workload(streamed, run.plan, run.tune, 4, 32, True)
    (found,) = coverage(work)
    assert (found.experts, found.chosen, found.tokens) == (8, 2, 4 * 32 * 2 / 8)
    enough = needed_samples(found, work)
    assert enough * 32 * 2 / 8 >= 4 * found.floor > (enough - 1) * 32 * 2 / 8
    assert needed_samples(dataclasses.replace(found, tokens=10**6), work) is None


def test_a_tried_product_is_shaped_like_the_real_one(monkeypatch):
    """Of many tokens few are tried, not few of the layer's channels: a thin layer's backward is another product."""
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: seen.append((x.shape, w.shape)) or linear(x, w))
    setting = Setting(torch.device("cpu"), torch.float32, contextlib.nullcontext, False, None)
    found = measure([LayerShape(4096, 2048, None, 65536)], Glue(64, 64, 0, 0, 16), setting)
    assert {x for x, _ in seen} == {(1024, 2048)} and min(weight[0] for _, weight in seen) >= 512
    assert next(iter(found.layers.values())).forward > 0
