"""Formats from one store: the same codes, without tuning again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny, tiny, token_ids
from transformers import AutoModelForCausalLM

from auto_round import AutoRound
from auto_round.compressors.again import export_work
from auto_round.formats.base import TensorShape
from auto_round.formats.writer import CheckpointWriter
from auto_round.store import StoreError
from auto_round.verify.artifact import Artifact
from auto_round.verify.finished import verify_artifact
from auto_round.verify.values import file_hashes


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
    from tiny import tiny_llama

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


# ---- tensors of several layers -----------------------------------------------------------------------------------


def test_slices_of_a_tensor_may_come_in_any_order(tmp_path):
    stack, other = torch.randn(3, 4, 5), torch.arange(7)
    announced = [("stack", TensorShape((3, 4, 5), torch.float32)), ("other", TensorShape((7,), torch.int64))]
    with CheckpointWriter(tmp_path, announced) as writer:
        writer.write("stack", stack[2], 2)
        writer.write("other", other)
        writer.write("stack", stack[0], 0)
        for wrong, index, message in [
            (stack[0], 0, "slice 0 of tensor 'stack' is written a second time"),
            (stack, None, "tensor 'stack' is written a second time"),
            (stack[1], 3, "has no slice 3"),
            (stack[1], -1, "has no slice -1"),
            (stack[1].half(), 1, r"float16\[4, 5\], announced as float32\[4, 5\]"),
        ]:
            with pytest.raises(ValueError, match=message):
                writer.write("stack", wrong, index)
        writer.write("stack", stack[1], 1)
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["stack"], stack) and torch.equal(found["other"], other)


def test_a_slice_that_never_came(tmp_path):
    with pytest.raises(ValueError, match="never written: stack"):  # noqa: SIM117
        with CheckpointWriter(tmp_path, [("stack", TensorShape((2, 3), torch.float32))]) as writer:
            writer.write("stack", torch.zeros(3), 1)


def of_expert(dense, layer, index, projection):
    """An expert's weight [out, in] in an ordinary checkpoint, where experts stand alone or, in gpt-oss', fused."""
    experts = f"model.layers.{layer}.mlp.experts"
    if f"{experts}.{index}.{projection}.weight" in dense:
        return dense[f"{experts}.{index}.{projection}.weight"]
    if projection == "down_proj":
        return dense[f"{experts}.down_proj"][index].t()
    return dense[f"{experts}.gate_up_proj"][index].t()[(projection == "up_proj") :: 2]


@pytest.mark.parametrize(("kind", "inside"), [("qwen3_moe", "switch_mlp"), ("gpt_oss", "experts")])
def test_mlx_gets_experts_stacked(kind, inside, tmp_path):
    source = save_tiny(tiny(kind), tmp_path / "source")
    rules = {"scheme": "W4A16G32", "layer_config": {"down_proj": {"bits": 3}}, "ignore_layers": r"layers\.1\..*up_proj"}
    run = AutoRound(str(source), iters=0, disable_opt_rtn=True, device_map="cpu", show_progress=False, **rules)
    folder = Path(run.quantize_and_save(tmp_path / "out", format="mlx")[1])
    stored = load_file(folder / "model.safetensors")
    stem = f"model.layers.0.mlp.{inside}.down_proj"
    count = stored[f"{stem}.weight"].shape[0]
    assert count > 1 and stored[f"{stem}.weight"].dtype == torch.uint32 and stored[f"{stem}.scales"].dim() == 3
    assert not any(".experts.0." in name for name in stored)
    artifact = Artifact.open(folder)
    dense = load_file(export_work(run.report["work_folder"], "fake", tmp_path / "fake") / "model.safetensors")
    for layer, projection in ((0, "gate_proj"), (0, "up_proj"), (1, "gate_proj"), (1, "down_proj")):
        for index in range(count):
            read = artifact.weight(f"model.layers.{layer}.mlp.experts.{index}.{projection}")
            assert torch.equal(read, of_expert(dense, layer, index, projection))
    kept = stored[f"model.layers.1.mlp.{inside}.up_proj.weight"]  # floats are stacked as well
    assert all(torch.equal(kept[index], of_expert(dense, 1, index, "up_proj")) for index in range(count))
    if kind == "gpt_oss":
        bias = dense["model.layers.0.mlp.experts.gate_up_proj_bias"]
        assert torch.equal(stored["model.layers.0.mlp.experts.up_proj.bias"], bias[:, 1::2])
    assert verify_artifact(folder).passed
