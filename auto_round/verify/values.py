"""Values of a written folder against what was quantized and against the source. Checks give None, or what is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from auto_round.data_type.base import QuantizedTensor
from auto_round.modeling.fused_moe.layout import Slice
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import LayerInfo, ModelPlan
from auto_round.store import Store
from auto_round.utils.common import all_finite
from auto_round.utils.device import trim_memory
from auto_round.verify.artifact import Artifact


def codes_problem(
    artifact: Artifact,
    plan: ModelPlan,
    store: Store,
    stems: Mapping[str, str],
    part: str,
    refused: Mapping[str, tuple[str, Slice]] | None = None,
    as_read: Callable[[QuantizedTensor, LayerInfo, torch.dtype], torch.Tensor] | None = None,
) -> str | None:
    """What a reader dequantizes of a block equals, bit for bit, what the tuning decided.

    refused: layers that an ordinary checkpoint holds inside a fused tensor.
    as_read: what a format's rounding of scales makes of a tensor, where it stores them in another dtype.
    """
    layers = plan.quantized(part)
    for name, tensor in store.load(part, layers).tensors.items():
        if refused and name in refused:
            stored, place = refused[name]
            read = place.take(artifact.checkpoint.read_one(stored))
        elif artifact.quantization is None:
            read = artifact.checkpoint.read_one(f"{stems[name]}.weight")
            read = read.t() if layers[name].info.transposed else read
        else:
            read = artifact.weight(stems[name])
        want = tensor.dequantize(read.dtype) if as_read is None else as_read(tensor, layers[name].info, read.dtype)
        if not torch.equal(read, want):
            return f"{name} reads back differently from what was quantized"
        if not all_finite(tensor.scale):
            return f"{name} holds scales that are not finite"
        if tensor.input_scale is not None and artifact.quantization is not None:
            found = artifact.input_scale(stems[name])
            if found is None or not torch.equal(found, tensor.input_scale.float()):
                return f"{name} lost the fixed scale of its inputs, or has another one"
    trim_memory()
    return None


def kept_problem(artifact: Artifact, streamed: StreamedModel, names: list[str]) -> str | None:
    """Tensors that are not quantized are the source's, byte for byte."""
    for name in names:
        if name not in artifact.checkpoint:
            return f"{name} is missing"
        mine, source = artifact.checkpoint.read_one(name), streamed.read_source(name)
        same = mine.dtype == source.dtype and mine.shape == source.shape
        if not same or not torch.equal(_bytes(mine), _bytes(source)):
            return f"{name} differs from the source"
    return None


def pieces_problem(artifact: Artifact, values: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Parts of source tensors that are stored as floats equal what the model holds."""
    for name, value in values:
        if name not in artifact.checkpoint:
            return f"{name} is missing"
        if not torch.equal(_bytes(artifact.checkpoint.read_one(name)), _bytes(value)):
            return f"{name} differs from the source"
    return None


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder but its reports."""
    hashes = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("report."):
            digest = hashlib.sha256()
            with open(file, "rb") as handle:
                while part := handle.read(1 << 22):
                    digest.update(part)
            hashes[file.relative_to(folder).as_posix()] = digest.hexdigest()
    return hashes
