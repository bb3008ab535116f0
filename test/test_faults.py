"""Every mishap has an outcome: nothing wrong is published, finished blocks are kept, a second start ends as if nothing
had happened."""

import contextlib
import dataclasses
import errno
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from mishaps import (
    BLOCKS,
    NAME,
    Failing,
    blocks,
    complete,
    content,
    ended,
    leftovers,
    nothing_wrong,
    prepare,
    quantize,
    start,
    undisturbed,
)
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny, token_ids

from auto_round import store
from auto_round.algorithms import signround, tuning
from auto_round.budget import DoesNotFitError, Working
from auto_round.cli.main import main
from auto_round.compressors import base, saving
from auto_round.compressors import blocks as quantizing
from auto_round.formats import writer
from auto_round.store import Store
from auto_round.utils import files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def model(whole, tmp_path):
    return Path(shutil.copytree(whole[0], tmp_path / "tiny"))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# ---- ended from outside ---------------------------------------------------------------------------------------------


def command(model, out):
    ids = out.parent / "ids.txt"
    ids.write_text("the quick brown fox jumps over the lazy dog " * 200)
    options = ("--dataset", ids, "--iters", "4", "--nsamples", "4", "--seqlen", "32", "--group_size", "32")
    return [str(word) for word in (model, *options, "--output_dir", out)]


@pytest.mark.parametrize(("number", "code", "says"), [("SIGTERM", 143, "SIGTERM"), ("SIGINT", 130, "interrupted")])
@pytest.mark.parametrize("place", ["tuning", "verifying"])
def test_a_signal_ends_a_run_cleanly(model, out, tmp_path, monkeypatch, number, code, says, place):
    owner, name = (tuning._Tuner, "finish") if place == "tuning" else (saving, "verify")
    real, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == (2 if place == "tuning" else 1):
            os.kill(os.getpid(), getattr(signal, number))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)

    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may be run where it is ignored
        with open(tmp_path / "said", "w") as said, contextlib.redirect_stderr(said):
            return main(command(model, out))

    assert ended(start(work)) == code
    said = (tmp_path / "said").read_text()
    assert said.rstrip().splitlines()[-1].startswith("auto-round: ") and says in said and "goes on" in said
    assert blocks(out) == (1 if place == "tuning" else BLOCKS)
    assert nothing_wrong(out)


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        seen = []
        monkeypatch.setattr("auto_round.cli.main._dispatch", lambda *a: seen.append(signal.getsignal(signal.SIGHUP)))
        main(["list"])
        assert seen == [signal.SIG_IGN] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_killed_between_the_two_renames(whole, model, out, monkeypatch):
    folder = quantize(model, out)
    (folder / "mine").write_text("an older artifact")
    rename = Path.rename

    def killed(self, target):
        rename(self, target)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Path, "rename", killed)
    assert ended(start(lambda: quantize(model, out) and 0)) == -signal.SIGKILL
    monkeypatch.undo()
    assert not folder.exists() and (out / f"{NAME}.replaced/mine").exists() and complete(out) == []
    with pytest.raises(RuntimeError, match="later"), monkeypatch.context() as patched:
        patched.setattr(base.Compressor, "run", lambda self: (_ for _ in ()).throw(RuntimeError("later")))
        quantize(model, out)
    assert (folder / "mine").exists()  # the start of a run puts it back, not only its end
    assert content(quantize(model, out)) == whole[1] and leftovers(out) == []


def test_a_rename_that_fails_keeps_the_older_artifact(model, out, monkeypatch):
    folder = quantize(model, out)
    (folder / "mine").write_text("an older artifact")
    rename = Path.rename

    def refuse(self, target):
        if self.name.endswith(".partial"):
            raise PermissionError(errno.EPERM, "not permitted")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        quantize(model, out)
    assert (folder / "mine").exists() and leftovers(out) == []


# ---- disk and memory ------------------------------------------------------------------------------------------------

WRITES = [(os, "write"), (os, "pwrite"), (os, "fsync"), (os, "replace"), (writer.json, "dump"), (store, "save_file")]
WRITES += [(shutil, "copyfile"), (Path, "write_text"), (Path, "mkdir"), (Path, "rename")]
ALLOCATIONS = [(torch, "cat"), (torch, "empty"), (torch, "zeros_like"), (torch.nn.functional, "linear")]
ALLOCATIONS += [(torch.Tensor, "clone"), (torch.Tensor, "to"), (torch.Tensor, "float")]


def spill(monkeypatch):
    """Let activations go to files."""
    real = base.Compressor.placement
    monkeypatch.setattr(base.Compressor, "placement", lambda self: dataclasses.replace(real(self), keep="file"))


def no_space():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("places", "error", "runs"), [(WRITES, no_space, 6), (ALLOCATIONS, MemoryError, 4)])
def test_a_full_disk_or_memory_at_any_call(whole, model, out, monkeypatch, places, error, runs):
    kind, failing = type(error()), Failing(monkeypatch, places, error)
    spill(monkeypatch)
    with failing.at(0):
        assert content(quantize(model, out.parent / "count")) == whole[1]
    total, kept = failing.calls, 0
    for run in range(runs):
        try:
            with failing.at(1 + run * (total - 1) // (runs - 1)):
                quantize(model, out / str(run))
        except (kind, DoesNotFitError):
            assert leftovers(out / str(run)) == []
            # only what comes after the last rename may fail and leave a model
            assert all(content(folder) == whole[1] for folder in complete(out / str(run)))
        kept += blocks(out / str(run))
        assert content(quantize(model, out / str(run))) == whole[1]
        shutil.rmtree(out / str(run))
    assert total > 30 and kept > BLOCKS


def test_a_write_that_does_less_than_it_says(whole, model, out, monkeypatch):
    real = os.pwrite
    calls = []

    def half(handle, data, offset):
        calls.append(len(data))
        return real(handle, data[: max(1, len(data) // 2)], offset)

    monkeypatch.setattr(os, "pwrite", half)
    monkeypatch.setattr(files.os, "preadv", lambda handle, buffers, offset: _short(handle, buffers[0], offset))
    spill(monkeypatch)
    assert content(quantize(model, out)) == whole[1] and calls


def _short(handle, view, offset):
    part = os.pread(handle, max(1, len(view) // 2), offset)
    view[: len(part)] = part
    return len(part)


def test_a_block_file_that_does_not_fit(model, out, tmp_path):
    """Written by a library in another language, so the limit is the system's."""

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            quantize(model, out)
        except OSError as error:
            (tmp_path / "said").write_text(str(error))
            return 1

    assert ended(start(work)) == 1
    said = (tmp_path / "said").read_text()
    assert "could not be written" in said and "finished blocks are kept" in said
    assert nothing_wrong(out)


def test_a_kill_leaves_no_activations(model, out):
    """Their files have no names: nobody would remove them."""

    def work():
        real = signround.quantize_block
        signround.quantize_block = lambda task: os.kill(os.getpid(), signal.SIGKILL) or real(task)
        quantizing.algorithm = lambda name: signround.quantize_block
        run = prepare(model)
        run.working = Working(keep="file")
        run.quantize_and_save(out)

    assert ended(start(work)) == -signal.SIGKILL
    assert not list(out.rglob("*.activations"))


# ---- numbers --------------------------------------------------------------------------------------------------------


def poison(model, name, index, value):
    weights = load_file(model / "model.safetensors")
    weights[name][index] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def test_kept_weights_that_are_not_finite_are_said(model, out):
    poison(model, "model.embed_tokens.weight", 319, float("nan"))  # a token that no sample holds
    run = prepare(model)
    run.quantize_and_save(out)
    assert any("embed_tokens.weight" in warning and "NaN" in warning for warning in run.report["warnings"])


def test_activations_that_are_not_finite_name_block_and_sample(model, out):
    samples = token_ids(8)
    samples[5][0, 3] = 280
    run = prepare(model, dataset=samples)
    run.observe_original()
    with torch.no_grad():
        run.model.model.embed_tokens.weight[280] = float("inf")
    with pytest.raises(ValueError, match=r"model.layers.0 of the original .* calibration sample \d"):
        run.quantize_and_save(out)
    assert nothing_wrong(out)


def test_an_original_that_is_not_finite_is_explained(model, out):
    poison(model, "model.embed_tokens.weight", slice(None), float("inf"))
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight holds NaN or Inf"):
        quantize(model, out)
    poison(model, "model.embed_tokens.weight", slice(None), 1.0)
    poison(model, "model.layers.1.mlp.up_proj.weight", slice(None), 3e38)
    with pytest.raises(ValueError, match=r"weights are finite, so from model.layers.1 on"):
        quantize(model, out)


def test_weights_outside_the_blocks_are_checked(model, out):
    run = prepare(model, quant_lm_head=True)
    with torch.no_grad():
        run.model.lm_head.weight[5] = float("nan")
    run.observe_original = lambda: None
    with pytest.raises(ValueError, match=r"lm_head.weight holds NaN"):
        run._quantize_outside(Store(out, {}))


@pytest.mark.parametrize("momentum", [0.5, 0.0])
def test_tuning_that_diverges_falls_back_to_where_it_started(model, out, momentum):
    wild = prepare(model, lr=9.9, minmax_lr=9.9, momentum=momentum)
    tuned = content(wild.quantize_and_save(out / "wild")[1])["model.safetensors"]
    assert all("kept" in block["note"] for block in wild.block_log)
    assert all(block["final_loss"] == block["start_loss"] for block in wild.block_log)
    still = quantize(model, out / "still", lr=0.0, minmax_lr=0.0)
    assert tuned == content(still)["model.safetensors"]
    assert any("kept" in block["note"] for block in wild.report["blocks"])


def test_a_loss_that_is_not_a_number_keeps_the_start(model, out, monkeypatch):
    """NaN is not smaller than any loss, so no state of the tuning is taken."""
    real, judged = tuning._Tuner.judge, []

    def judge(self):
        judged.append(real(self) if len(judged) % 3 == 0 else float("nan"))
        return judged[-1]

    monkeypatch.setattr(tuning._Tuner, "judge", judge)
    run = prepare(model)
    run.quantize_and_save(out)
    assert all("kept" in block["note"] and block["final_loss"] == block["start_loss"] for block in run.block_log)


def test_experts_without_tokens_are_rounded_and_counted(tmp_path, out):
    source = tiny("qwen3_moe", num_experts=4, num_experts_per_tok=1)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.zero_()  # ties: the first experts get every token
    run = prepare(save_tiny(source, tmp_path / "moe"), scheme="W4A16G32")
    folder = Path(run.quantize_and_save(out)[1])
    coverage = [block["experts"] for block in run.block_log]
    assert all(one["below_floor"] == 3 for one in coverage), coverage
    assert any("experts got fewer" in warning for warning in run.report["warnings"])
    scales = [tensor for name, tensor in load_file(folder / "model.safetensors").items() if "scales" in name]
    assert scales and all(scale.isfinite().all() for scale in scales)
