"""Memory that may be used: what is said, what is chosen from it, and what happens when it is refused on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny_llama, token_ids

from auto_round import AutoRound
from auto_round.budget import RELOAD_LIMIT, Budget, DoesNotFitError, Working, parse_budget
from auto_round.compressors import backoff, base, blocks
from auto_round.compressors.afford import Resources
from auto_round.compressors.backoff import MicroBatch
from auto_round.compressors.choose import LIBRARIES, choose, with_halvings
from auto_round.estimate import memory
from auto_round.settings import SettingsError, TuneSettings
from auto_round.speed import Glue, LayerShape
from auto_round.store import Store
from auto_round.utils.device import is_out_of_memory
from auto_round.verify.values import file_hashes
from auto_round.workload import BlockKind, Workload

GIB = 1 << 30
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
AMPLE = Resources(ram=1 << 50, disk=1 << 50, vram=1 << 50)
REFUSALS = (
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
)


# ---- what is said ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "ram", "devices"), [
    (None, None, ()),
    ("4GiB", 4 * GIB, ()),
    (123456, 123456, ()),
    ({"cpu": "4GiB", 0: "20GiB"}, 4 * GIB, ((0, 20 * GIB),)),
    ("cpu=4GiB, 1=2GB,cuda:0=500MB", 4 * GIB, ((0, 500 * 10**6), (1, 2 * 10**9))),
    ({"cuda": 7}, None, ((0, 7),)),
])  # fmt: skip
def test_budgets_as_people_write_them(given, ram, devices):
    budget = parse_budget(given)
    assert (budget.ram, budget.devices) == (ram, devices)
    assert budget.is_told == (given is not None)


@pytest.mark.parametrize("given", ["much", "gpu=3GiB", "cpu=", "cpu=1GiB,cpu=2GiB", {"cpu": 0}, {0: -1}, True, 2.5, []])
def test_budgets_that_mean_nothing(given, tmp_path):
    with pytest.raises(SettingsError, match="max_memory"):
        AutoRound(str(tmp_path), max_memory=given)


# ---- what is chosen ----------------------------------------------------------------------------------------------


def work_on(device: torch.device, iters: int = 2) -> Workload:
    """Llama-3-8B's block; 128 samples of 2048 tokens, 8 of them at once."""
    kind = BlockKind(("a", "b"), {}, 436 << 20, 218 << 20, 112 << 20, 56 << 20, 53248, 14336, None)
    return Workload(
        blocks=(kind,), outside_bytes=GIB, embedding_bytes=GIB // 2, outside_stored=0,
        head=LayerShape(32000, 4096, None, 1024), vocabulary=32000, glue=Glue(4096, 53248, 32, 128, 2048), itemsize=2,
        device=device, samples=128, length=2048, micro=8 * 2048, check_tokens=1024, tune=TuneSettings(iters=iters),
        needs_data=True,
    )  # fmt: skip


def needs(work: Workload, working: Working, libraries: int = 0) -> tuple[int, int]:
    host, device = memory(with_halvings(work, working.halvings), 0, libraries, working)
    return host.total, device.total if device else 0


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_ample_memory_is_used(device):
    found = choose(work_on(device), Budget(), AMPLE, 0)
    assert found == Working(0, "memory" if device == CPU else "device", "memory")
    assert choose(work_on(device), Budget(off_device=True), AMPLE, 0).keep == "memory"


def test_what_is_free_moves_activations_and_nothing_else():
    work = work_on(CPU)
    places = [("memory", "memory"), ("file", "memory"), ("file", "file")]
    enough = [2 * needs(work, Working(0, *place))[0] + 2 for place in places]
    found = [choose(work, Budget(), Resources(ram=free, disk=None), 0) for free in [*enough, 0]]
    assert found == [Working(0, *place) for place in [*places, places[-1]]]
    tight = Resources(ram=needs(work, Working())[0] * 4 // 3, disk=None)
    assert choose(work, Budget(sparing=True), tight, 0).keep == "file"
    assert choose(work, Budget(sparing=False), tight, 0).keep == "memory"


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_smaller_budget_never_works_with_more(device):
    """Whatever is chosen fits, until not even the least does; the micro-batch shrinks as the budget does."""
    work, before, least = work_on(device), 0, needs(work_on(device), Working(3, "file", "file"), LIBRARIES)
    for size in range(80, 0, -1):
        told = size * GIB // 2
        budget = Budget(told) if device == CPU else Budget(devices=((0, told),))
        found = choose(work, budget, AMPLE, LIBRARIES)
        assert found.halvings >= before
        before = found.halvings
        if told >= least[device == CUDA]:
            assert needs(work, found, LIBRARIES)[device == CUDA] <= told
    assert before == 3  # eight samples halve to one


def test_the_micro_batch_does_not_follow_what_is_free():
    work = work_on(CPU)
    budget = Budget(needs(work, Working(2, "file", "file"), LIBRARIES)[0])
    free = [Resources(ram=gib * GIB, disk=None) for gib in (200, 30, 1, 0)]
    assert {choose(work, budget, one, resident).halvings for one in free for resident in (0, 9 * GIB)} == {2}


def test_a_check_that_does_not_fit_is_left_out():
    """Loading the whole result must not be what a budget is too small for."""
    work = dataclasses.replace(work_on(CPU, iters=0), embedding_bytes=0, needs_data=False)
    for told in (40 * GIB, LIBRARIES + 3 * GIB, LIBRARIES + 9 * GIB // 4):
        found = choose(work, Budget(told), AMPLE, LIBRARIES)
        host, _ = memory(with_halvings(work, found.halvings), found.reload, LIBRARIES, found)
        assert host.total <= told
    assert found.reload < choose(work, Budget(), AMPLE, LIBRARIES).reload == RELOAD_LIMIT


def test_a_small_device_sends_activations_to_the_host():
    work = work_on(CUDA)
    told = Budget(devices=((0, needs(work, Working(0, "device"))[1] - 1),))
    assert choose(work, told, AMPLE, 0) == Working(0, "memory", "memory")
    poor = Resources(ram=3 * GIB, disk=None, vram=1 << 50)
    assert choose(work, told, poor, 0).keep == "file"
    other = Budget(devices=((1, GIB),))
    assert choose(work, other, AMPLE, 0) == Working(0, "device", "memory")


# ---- runs within a budget ----------------------------------------------------------------------------------------


def run(model: Path, out: Path, **changes: Any) -> tuple[Any, dict]:
    options = {"dataset": token_ids(4), "nsamples": 4, "seqlen": 32, "batch_size": 4, "iters": 1, **changes}
    made = AutoRound(str(model), scheme="W4A16G32", device_map="cpu", show_progress=False, **options)
    _, folder = made.quantize_and_save(out, force="max_memory" in changes)
    return made, json.loads((Path(folder) / "report.json").read_text())


def bytes_of(report: dict) -> dict[str, str]:
    return {n: h for n, h in file_hashes(Path(report["folder"])).items() if n.endswith((".safetensors", ".json"))}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tiny_llama(), tmp_path_factory.mktemp("budget") / "tiny")


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory) -> dict:
    return run(model, tmp_path_factory.mktemp("undisturbed"))[1]


def test_where_things_wait_changes_no_bit(model, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "choose_for", lambda run: Working(0, "file", "file"))
    _, report = run(model, tmp_path)
    assert {**report["working"], "reload": 0} == {"halvings": 0, "keep": "file", "logits": "file", "reload": 0}
    assert undisturbed["working"]["keep"] == "memory"
    assert bytes_of(report) == bytes_of(undisturbed) and report["kl"] == undisturbed["kl"]
    assert Path(report["work_folder"]).name == Path(undisturbed["work_folder"]).name
    assert not {file.suffix for file in Path(report["work_folder"]).iterdir()} & {".activations"}


def test_a_budget_belongs_to_what_a_run_depends_on(model, undisturbed, tmp_path):
    """The same budget goes on in the same work folder; its micro-batch changes the result by rounding only."""
    made, report = run(model, tmp_path, max_memory="1MB")
    assert report["working"]["halvings"] == 2 and made.working.micro(4) == 1
    assert any("by force" in text for text in report["warnings"])
    assert Path(report["work_folder"]).name != Path(undisturbed["work_folder"]).name
    again, _ = run(model, tmp_path, max_memory="1MB")
    assert all(block["resumed"] for block in again.block_log)
    assert report["kl"] == pytest.approx(undisturbed["kl"], rel=0.05)


# ---- memory that is refused --------------------------------------------------------------------------------------


def test_refusals_are_told_from_other_errors():
    assert all(map(is_out_of_memory, REFUSALS))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    others = (RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(28, "No space left on device"))
    assert not any(map(is_out_of_memory, (*others, DoesNotFitError("memory ran out: can't allocate memory"))))


@pytest.mark.parametrize("refusal", REFUSALS)
def test_the_micro_batch_is_halved(refusal, monkeypatch):
    monkeypatch.setattr(backoff, "free_memory_now", lambda device: None)  # a second in a process as full as this
    sizes, notes = [], []

    def work(size: int) -> int:
        sizes.append(size)
        if size > 2:
            raise refusal
        return size

    micro = MicroBatch(11, CPU, notes.append)
    assert micro.attempt("tuning a", work) == 2 and sizes == [11, 5, 2] and micro.size == 2
    assert len(notes) == 2 and "tuning a with 11 samples" in notes[0]
    assert micro.attempt("tuning b", work) == 2 and micro.attempt("tuning b", work, most=1) == 1
    with pytest.raises(DoesNotFitError, match="tuning c, with one sample"):
        micro.attempt("tuning c", lambda size: (_ for _ in ()).throw(refusal))
    with pytest.raises(ZeroDivisionError):
        micro.attempt("tuning d", lambda size: 1 / 0)


def test_tuning_begins_again_with_fewer_samples(model, tmp_path, monkeypatch):
    sizes, real = [], blocks.algorithm

    def strict(name: str):
        def quantize(task):
            sizes.append(task.io.micro)
            if task.io.micro > 1:
                raise MemoryError
            return real(name)(task)

        return quantize

    monkeypatch.setattr(blocks, "algorithm", strict)
    _, report = run(model, tmp_path)
    assert sizes == [4, 2, 1, 1]
    assert sum("memory ran out while quantizing model.layers.0" in text for text in report["warnings"]) == 2


def test_what_does_not_fit_is_named_and_what_is_done_is_kept(model, undisturbed, tmp_path, monkeypatch):
    real = blocks.algorithm

    def poor(name: str):
        def quantize(task):
            if task.name == "model.layers.1":
                raise MemoryError
            return real(name)(task)

        return quantize

    with monkeypatch.context() as patch, pytest.raises(DoesNotFitError, match=r"quantizing model\.layers\.1, with one"):
        patch.setattr(blocks, "algorithm", poor)
        run(model, tmp_path)
    assert len(list(tmp_path.glob("*.work/*/*.safetensors"))) == 1 and not list(tmp_path.glob("tiny-w4g32"))
    made, report = run(model, tmp_path)
    assert [block["resumed"] for block in made.block_log] == [True, False]
    assert bytes_of(report) == bytes_of(undisturbed)


@contextlib.contextmanager
def refusing(monkeypatch, turn: int, refusal: Exception) -> Iterator[types.SimpleNamespace]:
    """The linear product and every tensor read from or written to a work folder are counted; one is refused."""
    count = types.SimpleNamespace(calls=0)

    def counted(function):
        def call(*given, **named):
            count.calls += 1
            if count.calls == turn:
                raise refusal
            return function(*given, **named)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", counted(torch.nn.functional.linear))
        for owner, name in ((Store, "save"), (Store, "load"), (blocks, "put_weights"), (blocks, "check_finite")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield count


def test_memory_refused_anywhere(model, undisturbed, tmp_path, monkeypatch):
    """Twenty places, one a run: it ends with the right artifact, or with a clear error and nothing lost or wrong."""
    monkeypatch.setattr(base, "check_fits", lambda *given: None)  # tries how fast products are as often as it has time
    monkeypatch.setattr(backoff, "free_memory_now", lambda device: None)
    with refusing(monkeypatch, 0, MemoryError()) as count:
        run(model, tmp_path / "counted")
    outcomes = set()
    for turn in range(20):
        out, place = tmp_path / str(turn), 1 + turn * (count.calls - 1) // 19
        try:
            with refusing(monkeypatch, place, REFUSALS[turn % 3]):
                _, report = run(model, out)
            assert any("memory ran out" in text for text in report["warnings"])
            outcomes.add("went on")
        except DoesNotFitError as error:
            assert "memory ran out while" in str(error) and not list(out.glob("tiny-w4g32"))
            done = len(list(out.glob("*.work/*/*.safetensors")))
            made, report = run(model, out)
            assert sum(block["resumed"] for block in made.block_log) == done
            outcomes.add("ended")
        assert report["kl"] == pytest.approx(undisturbed["kl"], rel=0.02)
        assert [check["passed"] for check in report["checks"]] == [True] * len(undisturbed["checks"])
    assert outcomes == {"went on", "ended"}
