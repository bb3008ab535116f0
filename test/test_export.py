"""Formats from one store: the same codes, without tuning again."""

from pathlib import Path

import pytest
import torch
from tiny import token_ids
from transformers import AutoModelForCausalLM

from auto_round import AutoRound
from auto_round.compressors.again import export_work
from auto_round.store import StoreError
from auto_round.verify import file_hashes


@pytest.fixture
def finished(tiny_dir, tmp_path):
    run = AutoRound(
        str(tiny_dir),
        scheme="W3A16G32",
        layer_config={"down_proj": {"bits": 8, "group_size": 64}},
        ignore_layers="layers.1.self_attn.v_proj",
        dataset=token_ids(8),
        nsamples=8,
        seqlen=32,
        iters=2,
        quant_lm_head=True,
        device_map="cpu",
        show_progress=False,
    )
    return run, Path(run.quantize_and_save(tmp_path / "out")[1])


def test_export_again_is_the_same_artifact(finished, tmp_path):
    run, folder = finished
    again = export_work(run.report["work_folder"], "auto_round", tmp_path / "again")
    names = ("model.safetensors", "tokenizer.json")
    assert {n: file_hashes(folder)[n] for n in names} == {n: file_hashes(again)[n] for n in names}


def test_another_format_holds_the_same_weights(finished, tmp_path):
    run, folder = finished
    fake = export_work(run.report["work_folder"], "fake", tmp_path / "fake")
    batch = torch.cat(token_ids(2, 16))
    one, two = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (folder, fake))
    with torch.no_grad():
        assert torch.allclose(one(batch).logits, two(batch).logits, atol=1e-4)


def test_several_formats_in_one_run(tiny_dir, tmp_path):
    run = AutoRound(str(tiny_dir), iters=0, disable_opt_rtn=True, scheme="W4A16G32", show_progress=False)
    _, folders = run.quantize_and_save(tmp_path / "out", format="auto_round,fake")
    assert [Path(folder).name for folder in folders] == ["auto-round", "fake"]
    assert all((Path(folder) / "config.json").exists() for folder in folders)


def test_an_unfinished_or_foreign_work_folder(finished, tiny_dir, tmp_path):
    from tiny import save_tiny, tiny_llama

    work = Path(finished[0].report["work_folder"])
    with pytest.raises(StoreError, match="not the model"):
        export_work(work, "fake", tmp_path / "x", model=save_tiny(tiny_llama(seed=5), tmp_path / "other"))
    next(work.glob("*.safetensors")).unlink()
    with pytest.raises(StoreError, match="not finished"):
        export_work(work, "fake", tmp_path / "x")
    with pytest.raises(StoreError, match="no work folder"):
        export_work(tmp_path, "fake", tmp_path / "x")


def test_too_little_disk_space_is_said_before_any_work(tiny_dir, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    run = AutoRound(str(tiny_dir), iters=0, disable_opt_rtn=True, scheme="W4A16G32", show_progress=False)
    with pytest.raises(OSError, match="make room"):
        run.quantize_and_save(tmp_path / "out")
    assert run.native is None and not list(tmp_path.glob("out/*"))
