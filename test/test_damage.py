"""What surrounds a run is damaged, changes, or belongs to others: files of the work folder, the source, the output."""

import faulthandler
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from mishaps import (
    BLOCKS,
    NAME,
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

from auto_round.compressors.again import export_work
from auto_round.formats.export import unfinished
from auto_round.modeling.checkpoint import CheckpointError
from auto_round.store import Store, StoreError
from auto_round.utils.files import InUseError, Lock


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def model(whole, tmp_path):
    return Path(shutil.copytree(whole[0], tmp_path / "tiny"))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# ---- the work folder ------------------------------------------------------------------------------------------------


def work_of(out):
    return next(out.glob("*.work/*/run.json")).parent


def test_a_damaged_description_of_the_run(whole, model, out):
    quantize(model, out)
    file = work_of(out) / "run.json"
    good = file.read_text()
    for text, says in (
        (good[:100], "damaged"),
        ("[]", "damaged"),
        (good.replace("W2", "W3").replace("7", "8"), "not belong"),
    ):
        file.write_text(text)
        with pytest.raises(StoreError, match=says):
            export_work(work_of(out), "fake", out.parent / "again")
    again = prepare(model)
    assert content(again.quantize_and_save(out)[1]) == whole[1] and file.read_text() == good
    assert all(block["resumed"] for block in again.block_log)


def damage(kind, files):
    if kind == "cut":
        files[0].write_bytes(files[0].read_bytes()[:-20])
    elif kind == "swapped":
        one, two = files[0].read_bytes(), files[1].read_bytes()
        files[0].write_bytes(two)
        files[1].write_bytes(one)
    elif kind == "unsigned":
        save_file(load_file(files[0]), files[0])
    else:
        data = bytearray(files[0].read_bytes())
        data[-3] ^= 0xFF
        files[0].write_bytes(bytes(data))


@pytest.mark.parametrize("kind", ["cut", "swapped", "unsigned"])
def test_damaged_blocks_are_done_again(whole, model, out, kind):
    quantize(model, out)
    damage(kind, sorted(work_of(out).glob("*.safetensors")))
    (work_of(out) / "half.tmp").write_bytes(b"left by a kill")
    again = prepare(model)
    assert content(again.quantize_and_save(out)[1]) == whole[1]
    assert sum(not block["resumed"] for block in again.block_log) == (2 if kind == "swapped" else 1)
    assert leftovers(out) == []


def test_a_damaged_file_of_layers_outside_the_blocks(model, out):
    before = content(quantize(model, out, quant_lm_head=True))
    outside = [file for file in work_of(out).glob("*.safetensors") if "lm_head.codes" in load_file(file)]
    damage("flipped", outside)
    assert content(quantize(model, out, quant_lm_head=True)) == before


def test_other_sources_use_other_work_folders(model, out):
    """One tensor that changed, the configuration, the dtype of the computation: nothing old may be reused."""
    quantize(model, out)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    for number, change in enumerate(("weights", "config", "dtype"), 2):
        if change == "config":
            (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
        again = prepare(model, **({"model_dtype": "bfloat16"} if change == "dtype" else {}))
        again.quantize_and_save(out)
        assert not any(block["resumed"] for block in again.block_log), change
        assert len(list(out.glob("*.work/*/run.json"))) == number


# ---- the source -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["replaced", "cut", "removed"])
def test_a_shard_that_changes_while_it_is_read(whole, model, out, monkeypatch, change):
    file, save = model / "model.safetensors", Store.save
    kept = file.read_bytes()

    def disturb(self, block, result):
        save(self, block, result)
        if change == "replaced":
            weights = load_file(file)
            weights[f"model.layers.{BLOCKS - 1}.mlp.up_proj.weight"] *= 1.01
            save_file(weights, model / "new", {"format": "pt"})
            os.replace(model / "new", file)
        elif change == "cut":
            (model / "new").write_bytes(kept[: len(kept) // 3])
            os.replace(model / "new", file)
        else:
            file.unlink(missing_ok=True)

    monkeypatch.setattr(Store, "save", disturb)
    with pytest.raises(CheckpointError, match=r"model.safetensors (changed while|cannot be read)"):
        quantize(model, out)
    monkeypatch.setattr(Store, "save", save)
    assert nothing_wrong(out)
    assert blocks(out) >= 1
    file.write_bytes(kept)
    assert content(quantize(model, out)) == whole[1]


def test_a_shard_that_is_cut_in_place(model, out, monkeypatch):
    """The system ends a process that reads beyond the end of a mapped file; the next start names the file."""
    save = Store.save

    def cut(self, block, result):
        save(self, block, result)
        os.truncate(model / "model.safetensors", 9000)

    def work():
        faulthandler.disable()
        quantize(model, out)

    monkeypatch.setattr(Store, "save", cut)
    assert ended(start(work)) in (-signal.SIGBUS, 70)
    assert complete(out) == [] and blocks(out) == 1
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated"):
        quantize(model, out)


def states(folder):
    """What a write would change of the files in a folder."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (stat.st_ino, stat.st_mode, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def test_a_hub_cache_is_only_read(whole, model, out, tmp_path):
    cache = tmp_path / "hub/models--a--tiny"
    snapshot = cache / "snapshots/1234/tiny"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, cache / f"blobs/{number:040x}")
        (snapshot / file.name).symlink_to(f"../../../blobs/{number:040x}")
    for path in cache.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = states(cache)
    folder = quantize(snapshot, out)
    assert content(folder) == whole[1]
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert states(cache) == before
    with pytest.raises(OSError, match="the model's own folder"):
        quantize(snapshot, snapshot / "out")
    (snapshot / "LICENSE").symlink_to("../../../blobs/gone")
    with pytest.raises(OSError, match=r"LICENSE.* cannot be read"):
        quantize(snapshot, out)


# ---- the output -----------------------------------------------------------------------------------------------------


def test_nothing_of_others_is_replaced(model, out):
    (out / NAME).mkdir(parents=True)
    (out / NAME / "thesis.tex").write_text("years of work")
    with pytest.raises(OSError, match="not replaced"):
        quantize(model, out)
    assert (out / NAME / "thesis.tex").exists() and blocks(out) == 0
    run = prepare(model, iters=0, disable_opt_rtn=True)
    run.quantize()
    with pytest.raises(OSError, match="not replaced"):
        run.save_quantized(out)
    (out / NAME / "thesis.tex").unlink()
    made = prepare(model).quantize_and_save(out, format="auto_round,fake")[1]
    with pytest.raises(OSError, match="not replaced"):  # one format would take the place of both
        quantize(model, out)
    assert all((Path(folder) / "config.json").exists() for folder in made)


def test_two_runs_for_one_output(model, out):
    run, other = prepare(model), prepare(model, iters=3)
    run._open_store(out / f"{NAME}.work")
    with pytest.raises(StoreError, match="in use by another run"):
        other.quantize_and_save(out)
    run.store.close()
    other.quantize_and_save(out)
    with unfinished(out / "x") as partial, pytest.raises(InUseError, match="in use"), unfinished(out / "x"):
        partial.mkdir()
    assert not (out / "x.lock").exists()


def test_a_lock_whose_file_was_removed_is_no_lock(tmp_path, monkeypatch):
    first = Lock(tmp_path / "lock", "it")
    opened = os.open

    def late(*args):
        handle = opened(*args)
        first.close()  # which removes the file between the opening and the locking
        return handle

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(InUseError):
        Lock(tmp_path / "lock", "it")


def test_names_that_are_too_long_are_refused_before_any_work(model, out):
    long = shutil.copytree(model, model.with_name("m" * 245))
    with pytest.raises(OSError, match=r"cannot be written .*too long"):
        quantize(long, out)
    deep = out
    while (room := 3990 - len(str(deep))) > 1:  # of the 4096 that a path may have
        deep /= "d" * min(200, room - 1)
    with pytest.raises(OSError, match=r"cannot be written .*too long"):
        quantize(model, deep)
    assert list(out.glob("m*")) == []


def test_a_relative_output_and_a_changed_directory(whole, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = prepare(Path("tiny"))
    real = run.run
    (tmp_path / "elsewhere").mkdir()
    run.run = lambda: os.chdir(tmp_path / "elsewhere") or real()
    _, folder = run.quantize_and_save("out")
    assert folder == str(tmp_path / "out" / NAME) and content(folder) == whole[1]
    assert not any((tmp_path / "elsewhere").iterdir())


def test_clocks_do_not_matter(whole, model, out, monkeypatch):
    ticks = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    monkeypatch.setattr(time, "time_ns", lambda: next(ticks) * 10**9)
    save = Store.save
    monkeypatch.setattr(Store, "save", lambda self, *a: (save(self, *a), (_ for _ in ()).throw(KeyboardInterrupt))[0])
    with pytest.raises(KeyboardInterrupt):
        quantize(model, out)
    monkeypatch.setattr(Store, "save", save)
    for number, file in enumerate([*out.rglob("*"), *model.rglob("*")]):
        os.utime(file, (number * 10**8, number * 10**8))
    again = prepare(model)
    assert content(again.quantize_and_save(out)[1]) == whole[1]
    assert [block["resumed"] for block in again.block_log] == [True] + [False] * (BLOCKS - 1)
