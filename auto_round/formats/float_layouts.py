"""How layers are stored whose numbers are no plain integers, or whose inputs are quantized, too.

Pure functions between a `QuantizedTensor` and the tensors of a file; nothing is rounded. One class per layout, named
after what compressed-tensors calls it; formats choose among them and the loader of `auto_round` reads with the same.
Four-bit codes lie two to a byte, the even input in the low half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from auto_round.data_type.base import QuantizedTensor, group_count
from auto_round.formats.base import TensorShape
from auto_round.formats.packing import pack_bits, unpack_bits
from auto_round.schemes import QuantizationScheme, TensorSpec

F8 = torch.float8_e4m3fn
_ONES = 0x11  # a one in each half of a byte

Shapes = dict[str, TensorShape]
Tensors = dict[str, torch.Tensor]


class WeightLayout(Protocol):
    """The tensors of a weight [rows, columns] by their suffixes."""

    def shapes(self, rows: int, columns: int, spec: TensorSpec) -> Shapes:
        """Suffix → shape and dtype of what `pack` returns."""

    def pack(self, tensor: QuantizedTensor) -> Tensors:
        """Suffix → tensor."""

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: TensorSpec) -> QuantizedTensor:
        """The inverse of `pack`; one scale for a whole tensor may come back as one for every row."""


def pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """4-bit uint8 codes [rows, columns] → bytes [rows, columns/2]."""
    rows, columns = codes.shape
    if columns % 2:
        raise ValueError(f"{columns} four-bit codes in a row do not fill bytes")
    if rows * columns % 32:
        return codes[:, ::2] | codes[:, 1::2] << 4
    # A little-endian stream of four-bit codes is this layout, and its code is several times faster than the line above.
    return pack_bits(codes.reshape(1, -1), 4).view(torch.uint8).view(rows, columns // 2)


def unpack_pairs(octets: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_pairs`."""
    rows, half = octets.shape
    if rows * half % 16:
        return torch.stack((octets & 15, octets >> 4), dim=-1).view(rows, 2 * half)
    words = octets.reshape(1, -1)
    words = (words if words.storage_offset() % 4 == 0 else words.clone()).view(torch.int32)
    return unpack_bits(words, 4).view(rows, 2 * half)


def offset_to_sign(octets: torch.Tensor) -> torch.Tensor:
    """Bytes of codes k + 8 (MXINT4, k from -7 to 7) → bytes of the sign in bit 3 and the magnitude below it."""
    negative = ~octets >> 3 & _ONES
    return _negated(octets, negative) | negative << 3


def sign_to_offset(octets: torch.Tensor) -> torch.Tensor:
    """The inverse of `offset_to_sign`; minus zero becomes zero."""
    negative = octets >> 3 & _ONES
    return _negated(octets, negative) | (negative ^ _ONES) << 3


def _negated(octets: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """8 - x for the lower three bits x of codes where `which` is 1, and x for others; two codes at once."""
    return ((octets & 7 * _ONES) ^ (which * 7)) + which


class Mx4:
    """Microscaling numbers of 4 bits (Open Compute MX 1.0): `weight_packed`, and E8M0 `weight_scale` [out, in/32].

    MXFP4 codes are stored as they are. MXINT4, which only auto_round has, is stored as sign and magnitude, as its
    other readers expect it.
    """

    def shapes(self, rows: int, columns: int, spec: TensorSpec) -> Shapes:
        groups = group_count(columns, spec.group_size)
        return {
            "weight_packed": TensorShape((rows, columns // 2), torch.uint8),
            "weight_scale": TensorShape((rows, groups), torch.uint8),
        }

    def pack(self, tensor: QuantizedTensor) -> Tensors:
        octets = pack_pairs(tensor.codes)
        if tensor.spec.data_type == "mx_int":
            octets = offset_to_sign(octets)
        return {"weight_packed": octets, "weight_scale": tensor.scale.contiguous()}

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: TensorSpec) -> QuantizedTensor:
        octets = tensors["weight_packed"]
        if spec.data_type == "mx_int":
            octets = sign_to_offset(octets)
        return QuantizedTensor(unpack_pairs(octets), tensors["weight_scale"], None, spec)


class Mx8:
    """MXFP8: `weight` in float8_e4m3fn, and E8M0 `weight_scale` [out, in/32]."""

    def shapes(self, rows: int, columns: int, spec: TensorSpec) -> Shapes:
        groups = group_count(columns, spec.group_size)
        return {
            "weight": TensorShape((rows, columns), F8),
            "weight_scale": TensorShape((rows, groups), torch.uint8),
        }

    def pack(self, tensor: QuantizedTensor) -> Tensors:
        return {"weight": tensor.codes.contiguous().view(F8), "weight_scale": tensor.scale.contiguous()}

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: TensorSpec) -> QuantizedTensor:
        return QuantizedTensor(tensors["weight"].view(torch.uint8), tensors["weight_scale"], None, spec)


class Nvfp4:
    """NVFP4: `weight_packed`, `weight_scale` float8_e4m3fn [out, in/16], and `weight_global_scale` float32 [1].

    The last one is a divisor: weight = code · weight_scale / weight_global_scale.
    """

    def shapes(self, rows: int, columns: int, spec: TensorSpec) -> Shapes:
        groups = group_count(columns, spec.group_size)
        return {
            "weight_packed": TensorShape((rows, columns // 2), torch.uint8),
            "weight_scale": TensorShape((rows, groups), F8),
            "weight_global_scale": TensorShape((1,), torch.float32),
        }

    def pack(self, tensor: QuantizedTensor) -> Tensors:
        return {
            "weight_packed": pack_pairs(tensor.codes),
            "weight_scale": tensor.scale.contiguous(),
            "weight_global_scale": tensor.extra["global_scale"].reshape(1),
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: TensorSpec) -> QuantizedTensor:
        extra = {"global_scale": tensors["weight_global_scale"].reshape(1)}
        codes = unpack_pairs(tensors["weight_packed"])
        return QuantizedTensor(codes, tensors["weight_scale"], None, spec, extra)


@dataclass(frozen=True)
class Fp8:
    """`weight` in float8_e4m3fn beside scales of rows or blocks, and of a whole tensor if `whole` says so.

    scale_name, scale_dtype: what readers expect; the values are bfloat16's, so nothing is lost in either dtype.
    flat: the scales of rows are [out], not [out, 1].
    whole: a scale of the whole tensor is [1]; without it, it is repeated for every row.
    """

    scale_name: str = "weight_scale"
    scale_dtype: torch.dtype = torch.float32
    flat: bool = False
    whole: bool = False

    def shapes(self, rows: int, columns: int, spec: TensorSpec) -> Shapes:
        scale = self._scale_shape(rows, columns, spec)
        return {"weight": TensorShape((rows, columns), F8), self.scale_name: TensorShape(scale, self.scale_dtype)}

    def _scale_shape(self, rows: int, columns: int, spec: TensorSpec) -> tuple[int, ...]:
        if isinstance(spec.group_size, tuple):
            high, wide = spec.group_size
            return -(-rows // high), -(-columns // wide)
        if spec.group_size == 0 and self.whole:
            return (1,)
        return (rows,) if self.flat else (rows, group_count(columns, spec.group_size))

    def pack(self, tensor: QuantizedTensor) -> Tensors:
        rows, columns = tensor.codes.shape
        if tensor.spec.group_size == 0 and not self.whole:
            tensor = tensor.per_row()
        scale = tensor.scale.to(self.scale_dtype).reshape(self._scale_shape(rows, columns, tensor.spec))
        return {"weight": tensor.codes.contiguous().view(F8), self.scale_name: scale.contiguous()}

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: TensorSpec) -> QuantizedTensor:
        codes, scale = tensors["weight"].view(torch.uint8), tensors[self.scale_name].float()
        if spec.group_size == 0 and not self.whole:
            spec = dataclasses.replace(spec, group_size=-1)
        if spec.group_size in (-1, 0):
            scale = scale.reshape(-1, 1)
        return QuantizedTensor(codes, scale, None, spec)


@dataclass(frozen=True)
class Int8:
    """`weight` in int8, and `weight_scale` [out, 1]: symmetric, for engines that multiply integers."""

    scale_dtype: torch.dtype = torch.float32

    def shapes(self, rows: int, columns: int, spec: TensorSpec) -> Shapes:
        return {
            "weight": TensorShape((rows, columns), torch.int8),
            "weight_scale": TensorShape((rows, 1), self.scale_dtype),
        }

    def pack(self, tensor: QuantizedTensor) -> Tensors:
        scale = tensor.per_row().scale.to(self.scale_dtype)
        return {"weight": (tensor.codes ^ 128).view(torch.int8), "weight_scale": scale.contiguous()}

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: TensorSpec) -> QuantizedTensor:
        codes = tensors["weight"].view(torch.uint8) ^ 128
        spec = dataclasses.replace(spec, group_size=-1)
        return QuantizedTensor(codes, tensors["weight_scale"].half(), None, spec)


# ---- the fixed scale of what enters a layer ------------------------------------------------------------------------


def input_shapes(act: TensorSpec | None) -> Shapes:
    """Where a scheme fixes the scale of inputs: its suffix, and float32 [1]."""
    if act is None or (act.dynamic and not act.data_type.endswith("_static_gs")):
        return {}
    name = "input_scale" if act.data_type == "fp" else "input_global_scale"
    return {name: TensorShape((1,), torch.float32)}


@dataclass(frozen=True)
class LayerLayout:
    """All tensors of a layer: its weight's, and the input's fixed scale in `input_dtype`."""

    weight: WeightLayout
    input_dtype: torch.dtype = torch.float32

    def shapes(self, rows: int, columns: int, scheme: QuantizationScheme) -> Shapes:
        inputs = {name: TensorShape(part.shape, self.input_dtype) for name, part in input_shapes(scheme.act).items()}
        return {**self.weight.shapes(rows, columns, scheme.weight), **inputs}

    def pack(self, tensor: QuantizedTensor, scheme: QuantizationScheme, name: str) -> Tensors:
        """Raises ValueError if `tensor` lacks the input's scale; `name` is the layer's, for that message."""
        packed = self.weight.pack(tensor)
        for suffix in input_shapes(scheme.act):
            if tensor.input_scale is None:
                raise ValueError(f"{name} has no scale for its inputs, which calibration should have found")
            packed[suffix] = tensor.input_scale.reshape(1).to(self.input_dtype)
        return packed

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> QuantizedTensor:
        tensor = self.weight.unpack(tensors, scheme.weight)
        for suffix in input_shapes(scheme.act):
            tensor = dataclasses.replace(tensor, input_scale=tensors[suffix].float().reshape(1))
        return tensor


# ---- what auto_round calls them ------------------------------------------------------------------------------------

LLM_COMPRESSOR, FP8_STATIC, FP8 = "auto_round:llm_compressor", "auto_round:fp8_static", "auto_round:fp8"
INT8, MXINT4 = "auto_round:int8", "auto_round:mxint4"
AUTO_ROUND_PACKINGS = (LLM_COMPRESSOR, FP8_STATIC, FP8, INT8, MXINT4)


def float_packing(scheme: QuantizationScheme) -> str | None:
    """The packing of `auto_round` that holds such a layer; None for plain integers, which have packings of their own.

    Raises:
        ValueError: no layout exists for the scheme; the message says what is wrong with it.
    """
    act, family = scheme.act, scheme.data_type
    if family == "int" and act is None:
        return None
    check_scheme(scheme)
    if family == "fp":
        return FP8 if act is None or act.dynamic else FP8_STATIC
    return {"int": INT8, "mx_int": MXINT4, "mx_fp": LLM_COMPRESSOR, "nv_fp": LLM_COMPRESSOR}[family]


_INPUTS = {
    "int": ("int",),
    "fp": ("fp",),
    "mx_int": ("mx_int",),
    "mx_fp": ("mx_fp", "mx_fp_rceil"),
    "nv_fp": ("nv_fp4_with_static_gs",),
}
"""The number families in which inputs enter beside weights of a family."""


def check_scheme(scheme: QuantizationScheme) -> None:
    """Raises ValueError for a scheme that no layout of this file holds; the message says what is wrong with it."""
    family, act = scheme.data_type, scheme.act
    whole = scheme.group_size in (-1, 0)
    static = act is not None and not act.dynamic
    sizes = {"int": whole and scheme.bits == 8, "fp": whole or (isinstance(scheme.group_size, tuple) and not static)}
    if family not in _INPUTS or not scheme.sym or not sizes.get(family, True):
        kind = "symmetric" if scheme.sym else "asymmetric"
        raise ValueError(
            f"no layout holds {kind} {family!r} weights of {scheme.bits} bits in groups of {scheme.group_size} beside "
            f"inputs of {act.bits if act else 16} bits{' with a fixed scale' if static else ''}"
        )
    if act is not None and act.data_type not in _INPUTS[family]:
        known = " or ".join(_INPUTS[family])
        raise ValueError(f"inputs of {act.data_type!r} do not go with weights of {family!r}: use {known}")
    if static and (act.data_type != "fp" or act.group_size != 0):
        raise ValueError(
            "only float8 inputs can have a fixed scale, one for the whole tensor: use act_group_size=0, or act_dynamic"
        )


def auto_round_layout(packing: str, scheme: QuantizationScheme) -> LayerLayout:
    """The layout of a packing of `AUTO_ROUND_PACKINGS`; dtypes of scales are those that other writers chose."""
    if packing == LLM_COMPRESSOR:
        return LayerLayout(Nvfp4() if scheme.data_type == "nv_fp" else Mx4() if scheme.bits == 4 else Mx8())
    if packing == FP8_STATIC:
        return LayerLayout(Fp8(scale_dtype=torch.bfloat16, flat=True), torch.bfloat16)
    weights = {FP8: Fp8("weight_scale_inv", torch.bfloat16), INT8: Int8(torch.float16), MXINT4: Mx4()}
    return LayerLayout(weights[packing])
