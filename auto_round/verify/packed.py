"""Reads layers of a written folder with NumPy, from the descriptions of their formats; plain GPTQ-like layers excepted.

It shares no code with the writers, and takes widths, groups and number families from config.json as every reader does:
compressed-tensors' groups, AutoRound's fields, or those of Transformers' fine-grained float8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from auto_round.modeling.checkpoint import Checkpoint, CheckpointError
from auto_round.utils.patterns import match

PACKED = (".qweight", ".weight_scale", ".weight_scale_inv")  # what only a quantized layer has


def is_compressed(quantization: Mapping[str, Any] | None) -> bool:
    """Whether a `quantization_config` is compressed-tensors'."""
    return (quantization or {}).get("quant_method") == "compressed-tensors"


def reader_missing(quantization: Mapping[str, Any] | None) -> str | None:
    """Why Transformers cannot load such a folder here; None if it can."""
    from transformers.utils import is_compressed_tensors_available

    if not is_compressed(quantization) or is_compressed_tensors_available():
        return None
    return "Transformers was not made to load the result: that needs compressed-tensors, which is not installed"


def reader_rounds_inputs(quantization: Mapping[str, Any] | None, layer: str) -> bool:
    """Whether Transformers, on a CPU, rounds what enters a layer whose scheme quantizes inputs.

    It does not where it dequantizes weights while it loads: with `dequantize`, fused experts, and float8 without GPU.
    """
    if not quantization or quantization.get("quant_method") == "fp8":
        return False
    if not is_compressed(quantization):
        return True
    return not quantization.get("dequantize") and not re.search(r"\.experts\.\d+\.", f".{layer}.")


def packed_layers(names: Iterable[str]) -> list[str]:
    """Stems of quantized layers among the names of tensors."""
    return [name.rpartition(".")[0] for name in names if name.endswith(PACKED)]


# ---- what the configuration says of a layer --------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """How a layer is stored: its number family, width, group or block, and the suffixes of its tensors.

    family: "int", "mx_fp", "mx_int", "nv_fp", "fp", or "gptq" for layers with a `qweight`.
    """

    family: str
    bits: int
    needed: tuple[str, ...]
    symmetric: bool = True
    group_size: int | None = None
    block: tuple[int, int] | None = None


def stored(quantization: Mapping[str, Any], layer: str) -> Stored:
    """What the configuration says of a layer that is packed.

    Raises:
        CheckpointError: the configuration does not mean the layer.
    """
    if is_compressed(quantization):
        return _stored_compressed(quantization, layer)
    if quantization.get("quant_method") == "fp8":
        if any(_means(name, layer) for name in quantization.get("modules_to_not_convert") or ()):
            raise CheckpointError(f"{layer} is packed, but config.json says that it is not quantized")
        return Stored("fp", 8, ("weight", "weight_scale_inv"), block=tuple(quantization["weight_block_size"]))
    fields = {**quantization, **quantization.get("extra_config", {}).get(layer, {})}
    if fields["bits"] > 8:
        raise CheckpointError(f"{layer} is packed, but config.json says that it is not quantized")
    return _stored_auto_round(fields)


def _stored_auto_round(fields: Mapping[str, Any]) -> Stored:
    family, bits = fields.get("data_type", "int"), fields["bits"]
    with_inputs = (fields.get("act_bits") or 16) <= 8
    if family == "int":
        needed = ("weight", "weight_scale") if with_inputs else ("qweight", "qzeros", "scales")
        return Stored("int" if with_inputs else "gptq", bits, needed)
    if family == "fp":
        block = fields.get("weight_block_size")
        if with_inputs and fields.get("act_dynamic") is False:
            return Stored(family, bits, ("weight", "weight_scale", "input_scale"))
        return Stored(family, bits, ("weight", "weight_scale_inv"), block=block and tuple(block))
    if family == "nv_fp":
        return Stored(family, bits, _nvfp4(with_inputs))
    return Stored(family, bits, ("weight" if bits == 8 else "weight_packed", "weight_scale"))


def _nvfp4(with_inputs: bool) -> tuple[str, ...]:
    inputs = ("input_global_scale",) if with_inputs else ()
    return ("weight_packed", "weight_scale", "weight_global_scale", *inputs)


def _stored_compressed(quantization: Mapping[str, Any], layer: str) -> Stored:
    group = _group_of(quantization, layer)
    args, inputs = group["weights"], group.get("input_activations")
    bits, symmetric, size = int(args["num_bits"]), args["symmetric"], args.get("group_size")
    form = group.get("format") or quantization["format"]
    if form == "pack-quantized":
        zeros = () if symmetric else ("weight_zero_point",)
        needed = ("weight_packed", "weight_scale", "weight_shape", *zeros)
        return Stored("int", bits, needed, symmetric, size if args["strategy"] == "group" else None)
    if form == "nvfp4-pack-quantized":
        return Stored("nv_fp", bits, _nvfp4(inputs is not None), group_size=size)
    if form in ("mxfp4-pack-quantized", "mxfp8-quantized"):
        return Stored("mx_fp", bits, ("weight_packed" if bits == 4 else "weight", "weight_scale"), group_size=size)
    static = () if inputs is None or inputs["dynamic"] else ("input_scale",)
    block = args.get("block_structure")
    family = "int" if args["type"] == "int" else "fp"
    return Stored(family, bits, ("weight", "weight_scale", *static), block=block and tuple(block))


def weight_args(quantization: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
    """The `weights` of a layer's group of compressed-tensors' configuration."""
    return _group_of(quantization, layer)["weights"]


def _group_of(quantization: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
    """A layer's group: exact names come before expressions, those before classes."""
    if any(_means(name, layer) for name in quantization.get("ignore") or ()):
        raise CheckpointError(f"{layer} is packed, and ignored by quantization_config")
    groups = list(quantization["config_groups"].values())
    exact = [group for group in groups if layer in group["targets"]]
    matched = [group for group in groups if any(_means(target, layer) for target in group["targets"])]
    by_class = [group for group in groups if "Linear" in group["targets"]]
    for group in (*exact, *matched, *by_class):
        return group
    raise CheckpointError(f"{layer} is packed, and no group of quantization_config means it")


def _means(target: str, layer: str) -> bool:
    return target == layer or (target.startswith("re:") and match(target[3:], layer))


def packed_problem(checkpoint: Checkpoint, quantization: Mapping[str, Any]) -> str | None:
    """A packed layer that lacks a tensor, is stored twice, or that the configuration does not mean."""
    layers = packed_layers(checkpoint.names())
    for name, entry in checkpoint.entries.items():
        stem, _, suffix = name.rpartition(".")
        codes = suffix == "weight_packed" or (suffix == "weight" and entry.dtype in (torch.float8_e4m3fn, torch.int8))
        if codes and stem not in layers:
            return f"{stem} has no weight_scale"
    for layer in layers:
        try:
            needed = stored(quantization, layer).needed
        except CheckpointError as error:
            return str(error)
        missing = [suffix for suffix in needed if f"{layer}.{suffix}" not in checkpoint]
        if missing:
            return f"{layer} has no {missing[0]}"
        if "weight" not in needed and f"{layer}.weight" in checkpoint:
            return f"{layer} is stored twice, packed and as floats"
    return None


# ---- numbers ---------------------------------------------------------------------------------------------------------


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


def small_floats(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """float32 value of every code of an IEEE-like format with a sign bit (E2M1: 2, 1; E4M3: 4, 3).

    E4M3's two NaN (0x7f, 0xff) are NaN; neither format has infinities (Open Compute OFP8 1.0, MX 1.0).
    """
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = codes % (1 << mantissa_bits)
    exponent = (codes >> mantissa_bits) % (1 << exponent_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    leading = np.where(exponent > 0, 1 << mantissa_bits, 0)
    values = np.ldexp((leading + mantissa).astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits)
    values[codes >= len(codes) // 2] *= -1
    if exponent_bits == 4:
        values[[0x7F, 0xFF]] = np.nan
    return values.astype(np.float32)


def _octets(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def _halves(octets: np.ndarray) -> np.ndarray:
    """Bytes [rows, n] → codes [rows, 2n], the low half first."""
    return np.stack((octets % 16, octets // 16), axis=-1).reshape(len(octets), -1)


def _elements(kind: Stored, tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """float32 [out, in] before scales."""
    if kind.family == "int":
        return tensors["weight"].numpy().astype(np.float32)
    if kind.bits == 8:
        return small_floats(4, 3)[_octets(tensors["weight"])]
    codes = _halves(tensors["weight_packed"].numpy())
    if kind.family == "mx_int":
        return (codes % 8).astype(np.float32) / 4 * np.where(codes < 8, np.float32(1), np.float32(-1))
    return small_floats(2, 1)[codes]


def _scales(kind: Stored, tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """float32 scales as they are stored."""
    scale = tensors[kind.needed[1]]
    if kind.family.startswith("mx"):
        return np.ldexp(np.float32(1), scale.numpy().astype(np.int32) - 127)
    if kind.family == "nv_fp":
        return small_floats(4, 3)[_octets(scale)] / tensors["weight_global_scale"].numpy()
    return scale.float().numpy()


def _wide(scale: np.ndarray, kind: Stored, layer: str, shape: tuple[int, int]) -> np.ndarray:
    """Scales as they multiply a weight of that shape.

    Raises:
        CheckpointError: there are more or fewer of them than the configuration says.
    """
    rows, columns = shape
    if kind.block is not None:
        high, wide = kind.block
        expected = (-(-rows // high), -(-columns // wide))
        if scale.shape == expected:
            return scale.repeat(high, 0).repeat(wide, 1)[:rows, :columns]
    elif kind.family in ("int", "fp"):
        if scale.size in (1, rows) and scale.shape[0] == scale.size:
            return scale.reshape(-1, 1)
    else:
        size = kind.group_size or {"nv_fp": 16}.get(kind.family, 32)
        if scale.shape == (rows, columns // size):
            return scale.repeat(size, 1)
    raise CheckpointError(f"{layer} has scales of shape {scale.shape}, which do not fit its weight {shape}")


def read_packed(checkpoint: Checkpoint, quantization: Mapping[str, Any], layer: str) -> torch.Tensor:
    """float32 [out, in] weight of a packed layer that is not of GPTQ's kind."""
    kind = stored(quantization, layer)
    tensors = checkpoint.read([f"{layer}.{suffix}" for suffix in kind.needed])
    tensors = {suffix: tensors[f"{layer}.{suffix}"] for suffix in kind.needed}
    if "weight_shape" in tensors:
        return _read_stream(kind, tensors, layer)
    dtypes = {"weight_packed": torch.uint8, "weight": torch.int8 if kind.family == "int" else torch.float8_e4m3fn}
    if tensors[kind.needed[0]].dtype != dtypes[kind.needed[0]]:
        raise CheckpointError(f"{layer} is stored in another dtype than its {kind.family} of {kind.bits} bits")
    values = _elements(kind, tensors)
    return torch.from_numpy(values * _wide(_scales(kind, tensors), kind, layer, values.shape))


def _read_stream(kind: Stored, tensors: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
    """A layer of compressed-tensors' `pack-quantized`."""
    bits = kind.bits
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    rows, columns = tensors["weight_shape"].tolist()
    groups = columns // kind.group_size if kind.group_size else 1
    if packed.shape != (rows, columns * bits // 32) or scale.shape != (rows, groups):
        raise CheckpointError(f"{layer} has tensors of shapes that its group of {bits} bits does not have")
    values = stream_codes(packed.numpy(), bits).astype(np.float32).reshape(rows, groups, -1)
    if kind.symmetric:
        values -= np.float32(1 << (bits - 1))
    else:
        words = tensors["weight_zero_point"].numpy()
        if words.shape != (rows * bits // 32, groups):
            raise CheckpointError(f"{layer} has zero points of another shape than its {bits}-bit group")
        values -= stream_codes(words.T, bits).T.astype(np.float32)[..., None]
    values *= scale.float().numpy()[..., None]
    return torch.from_numpy(values.reshape(rows, columns))


def read_input_scale(checkpoint: Checkpoint, quantization: Mapping[str, Any], layer: str) -> torch.Tensor | None:
    """float32 [1], the fixed scale of what enters a layer; None where its configuration has none."""
    name = next((suffix for suffix in stored(quantization, layer).needed if suffix.startswith("input")), None)
    return None if name is None else checkpoint.read_one(f"{layer}.{name}").float()
