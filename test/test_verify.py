"""Damage an artifact in every way we can think of: the verifier must name it."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round import AutoRound
from auto_round.modeling.checkpoint import CheckpointError
from auto_round.verify.finished import verify_artifact


@pytest.fixture
def artifact(tiny_dir, tmp_path):
    run = AutoRound(
        str(tiny_dir), scheme="W4A16G32", iters=0, disable_opt_rtn=True, device_map="cpu", show_progress=False
    )
    return Path(run.quantize_and_save(tmp_path / "out")[1])


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "report.json").unlink()  # so that the hash of the file is not what gives it away


def failed(folder, against=None):
    try:
        result = verify_artifact(folder, against)
    except (CheckpointError, KeyError, ValueError) as error:
        return str(error)
    return " ".join(check.detail for check in result.checks if not check.passed)


LAYER = "model.layers.0.mlp.down_proj"


def drop_scales(tensors):
    del tensors[f"{LAYER}.scales"]


def poison_scale(tensors):
    tensors[f"{LAYER}.scales"][0, 0] = float("nan")


def store_twice(tensors):
    tensors[f"{LAYER}.weight"] = torch.zeros(64, 128)


def drop_norm(tensors):
    del tensors["model.norm.weight"]


def swap_layers(tensors):
    other = LAYER.replace("layers.0", "layers.1")
    for suffix in ("qweight", "qzeros", "scales"):
        one, two = f"{LAYER}.{suffix}", f"{other}.{suffix}"
        tensors[one], tensors[two] = tensors[two], tensors[one]


def zero_scales(tensors):
    tensors[f"{LAYER}.scales"].zero_()


def test_an_untouched_artifact_passes(artifact, tiny_dir):
    result = verify_artifact(artifact, tiny_dir)
    assert result.passed, result.checks
    assert result.kl is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_scales, f"{LAYER} has no scales"),
        (poison_scale, f"{LAYER}.scales holds NaN"),
        (store_twice, f"{LAYER} is stored twice"),
        (drop_norm, "model.norm.weight of the original is missing"),
        (swap_layers, f"{LAYER} is"),
        (zero_scales, f"{LAYER} is"),
    ],
)
def test_damaged_tensors_are_named(artifact, tiny_dir, change, words):
    edit(artifact, change)
    assert words in failed(artifact, tiny_dir)


def test_any_changed_file_is_named(artifact):
    with open(artifact / "tokenizer_config.json", "a") as handle:
        handle.write(" ")
    assert "tokenizer_config.json was changed" in failed(artifact)


def test_a_truncated_shard_is_named(artifact):
    file = artifact / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors is truncated" in failed(artifact)


def test_a_lying_header_is_refused(artifact):
    file = artifact / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [1 << 40]
    text = json.dumps(header).encode().ljust(length)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert "model.norm.weight" in failed(artifact)


def test_everything_else_is_carried_over(artifact, tiny_dir):
    assert (artifact / "NOTICE.txt").read_bytes() == (tiny_dir / "NOTICE.txt").read_bytes()
    ours = {"config.json", "quantization_config.json", "report.json", "report.html"}
    theirs = {file.name for file in tiny_dir.iterdir()}
    assert {file.name for file in artifact.iterdir()} - ours == theirs - {"config.json"}
