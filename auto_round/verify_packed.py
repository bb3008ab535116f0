"""Reads layers of a compressed-tensors `pack-quantized` folder with NumPy, from the description of that format.

It shares no code with the writer, and takes widths, groups and symmetry from config.json as every reader does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from auto_round.modeling.checkpoint import Checkpoint, CheckpointError

PACKED = ".weight_packed"


def is_compressed(quantization: Mapping[str, Any] | None) -> bool:
    """Whether a `quantization_config` is compressed-tensors'."""
    return (quantization or {}).get("quant_method") == "compressed-tensors"


def reader_missing(quantization: Mapping[str, Any] | None) -> str | None:
    """Why Transformers cannot load such a folder here; None if it can."""
    from transformers.utils import is_compressed_tensors_available

    if not is_compressed(quantization) or is_compressed_tensors_available():
        return None
    return "Transformers was not made to load the result: that needs compressed-tensors, which is not installed"


def weight_args(quantization: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
    """The `weights` of a layer's group: exact names come before expressions, those before classes."""
    if any(_means(name, layer) for name in quantization.get("ignore") or ()):
        raise CheckpointError(f"{layer} is packed, and ignored by quantization_config")
    groups = list(quantization["config_groups"].values())
    exact = [group for group in groups if layer in group["targets"]]
    matched = [group for group in groups if any(_means(target, layer) for target in group["targets"])]
    by_class = [group for group in groups if "Linear" in group["targets"]]
    for group in (*exact, *matched, *by_class):
        return group["weights"]
    raise CheckpointError(f"{layer} is packed, and no group of quantization_config means it")


def _means(target: str, layer: str) -> bool:
    return target == layer or (target.startswith("re:") and re.match(target[3:], layer) is not None)


def compressed_problem(checkpoint: Checkpoint, quantization: Mapping[str, Any]) -> str | None:
    """A packed layer that lacks a tensor, is stored twice, or that the configuration does not mean."""
    for name in checkpoint.names():
        if not name.endswith(PACKED):
            continue
        layer = name.removesuffix(PACKED)
        try:
            symmetric = weight_args(quantization, layer)["symmetric"]
        except CheckpointError as error:
            return str(error)
        needed = ["weight_scale", "weight_shape", *([] if symmetric else ["weight_zero_point"])]
        missing = [suffix for suffix in needed if f"{layer}.{suffix}" not in checkpoint]
        if missing:
            return f"{layer} has no {missing[0]}"
        if f"{layer}.weight" in checkpoint:
            return f"{layer} is stored twice, packed and as floats"
    return None


def stream_codes(words: np.ndarray, bits: int) -> np.ndarray:
    """[rows, n·bits] int32 words → uint8 codes [rows, n·32]: each row is a little-endian stream of bits."""
    blocks = np.ascontiguousarray(words).view(np.uint32).reshape(len(words), -1, bits)
    codes = np.empty((*blocks.shape[:2], 32), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for place in range(32):
        first, low = divmod(place * bits, 32)
        value = blocks[..., first] >> np.uint32(low)
        if low + bits > 32:
            value = value | blocks[..., first + 1] << np.uint32(32 - low)
        codes[..., place] = value & mask
    return codes.reshape(len(words), -1)


def read_compressed(checkpoint: Checkpoint, quantization: Mapping[str, Any], layer: str) -> torch.Tensor:
    """float32 [out, in] weight of a packed layer."""
    args = weight_args(quantization, layer)
    bits = int(args["num_bits"])
    suffixes = ["weight_packed", "weight_scale", "weight_shape", *([] if args["symmetric"] else ["weight_zero_point"])]
    tensors = checkpoint.read([f"{layer}.{suffix}" for suffix in suffixes])
    packed, scale, shape = (tensors[f"{layer}.{suffix}"] for suffix in suffixes[:3])
    rows, columns = shape.tolist()
    groups = columns // args["group_size"] if args["strategy"] == "group" else 1
    if packed.shape != (rows, columns * bits // 32) or scale.shape != (rows, groups):
        raise CheckpointError(f"{layer} has tensors of shapes that its group of {bits} bits does not have")
    values = stream_codes(packed.numpy(), bits).astype(np.float32).reshape(rows, groups, -1)
    if args["symmetric"]:
        values -= np.float32(1 << (bits - 1))
    else:
        words = tensors[f"{layer}.weight_zero_point"].numpy()
        if words.shape != (rows * bits // 32, groups):
            raise CheckpointError(f"{layer} has zero points of another shape than its {bits}-bit group")
        values -= stream_codes(words.T, bits).T.astype(np.float32)[..., None]
    values *= scale.float().numpy()[..., None]
    return torch.from_numpy(values.reshape(rows, columns))
