"""A quantized tensor as a value, and the grouping that all data types share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from auto_round.data_type import data_type
from auto_round.schemes import TensorSpec


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight after its codes are decided. Nobody rounds again: exporters move these bits.

    What the fields hold is the family's business (`spec.data_type`, `auto_round/data_type/`); for integers:

    codes: uint8 [out, in], unsigned codes 0 … 2^bits - 1 (a symmetric code q is stored as q + 2^(bits-1)).
    scale: float16 [out, groups], or [1, 1] when the whole tensor is one group; may be negative (full-range symmetric).
    zero_point: uint8, shape of `scale`; None for symmetric, whose zero point is 2^(bits-1).
    extra: what else a family keeps, by name (NVFP4's scale of the whole tensor, llama.cpp's scales of super-blocks).
    input_scale: float32 [1], the fixed scale of what enters the layer, where the scheme has one (see
        `NumberFamily.input_scale`).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    spec: TensorSpec
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    input_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2:
            raise ValueError(f"codes must be uint8 [out, in], not {self.codes.dtype} {tuple(self.codes.shape)}")
        if self.spec.data_type == "int":
            self._check_integers()

    def _check_integers(self) -> None:
        rows, columns = self.codes.shape
        if self.scale.shape[0] not in (1, rows) or columns % self.scale.shape[1]:
            raise ValueError(f"scale {tuple(self.scale.shape)} does not fit codes {tuple(self.codes.shape)}")
        if (self.zero_point is None) != self.spec.sym:
            raise ValueError("a zero point goes with an asymmetric scheme, and only with one")
        if self.zero_point is not None and self.zero_point.shape != self.scale.shape:
            raise ValueError(f"zero point {tuple(self.zero_point.shape)} and scale {tuple(self.scale.shape)} differ")

    @property
    def group_size(self) -> int:
        """Inputs that share a scale, as stored (never -1 or 0)."""
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The [out, in] weight that the codes mean; exact in float32 or rounded once to it, then to `dtype`."""
        return data_type(self.spec.data_type).dequantize(self).to(dtype)

    def per_row(self) -> QuantizedTensor:
        """The same values with a scale for every output row, which file formats can hold."""
        rows = self.codes.shape[0]
        if self.scale.shape[0] == rows:
            return self
        zero_point = None if self.zero_point is None else self.zero_point.expand(rows, -1).contiguous()
        spec = dataclasses.replace(self.spec, group_size=-1)
        scale = self.scale.expand(rows, -1).contiguous()
        return dataclasses.replace(self, scale=scale, zero_point=zero_point, spec=spec)


@dataclass(frozen=True)
class WeightTask:
    """A weight to quantize, and what is known of it.

    weight: [out, in]; importance: [in], mean square of each input channel (None: all alike); search: look for the
    scales of least weighted error instead of taking min/max; tune_clip: scales are tuned, not only rounding.
    fused_max: largest magnitude over the layers with which engines make one of this, for scales they must share.
    """

    weight: torch.Tensor
    spec: TensorSpec
    importance: torch.Tensor | None = None
    search: bool = False
    tune_clip: bool = True
    fused_max: float | None = None


class Tunable(Protocol):
    """A weight whose rounding is being tuned.

    parameters: name → leaf tensor that the optimizer moves; "value" (rounding offsets) and "clip" have learning rates.
    """

    parameters: Mapping[str, torch.Tensor]

    def fake_quantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The quantized weight [out, in] in `dtype`, bit for bit `finish().dequantize(dtype)`, with gradients."""

    def reset(self) -> None:
        """Back to the starting point."""

    def finish(self) -> QuantizedTensor: ...


class NumberFamily(Protocol):
    """What a module of `auto_round/data_type/` offers."""

    def quantize(self, task: WeightTask) -> QuantizedTensor:
        """Round to nearest, with scales from min/max or searched ones."""

    def tunable(self, task: WeightTask) -> Tunable:
        """The weight under tuning; it starts as what `quantize` gives."""

    def dequantize(self, tensor: QuantizedTensor) -> torch.Tensor:
        """float32 [out, in]."""

    # Families whose scales are stored as they are, so that they can be trained after the codes are decided:

    def rescaled(self, tensor: QuantizedTensor, factor: torch.Tensor) -> QuantizedTensor:
        """The same codes with scales multiplied by factors of their shape, as they are stored then."""

    # Families in which engines take activations, too:

    def input_scale(self, largest: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
        """float32 [1], the fixed scale for inputs up to this magnitude, rounded to what files store."""

    def quantize_input(self, x: torch.Tensor, spec: TensorSpec, input_scale: torch.Tensor | None) -> torch.Tensor:
        """A layer's input […, in] as the engine would round it, in the dtype of `x`; gradients pass straight through.

        input_scale: as `input_scale` gave it; None where all scales are found anew for each input.
        """


def group_count(in_features: int, group_size: int) -> int:
    """Groups along the input dimension for a group size that divides it (see `plan.fit_group_size`)."""
    return 1 if group_size in (-1, 0) else in_features // group_size


def grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """View [out, in] as [out, groups, inputs per group]; as [1, 1, out·in] for one group per tensor."""
    if group_size == 0:
        return weight.reshape(1, 1, -1)
    return weight.reshape(weight.shape[0], group_count(weight.shape[1], group_size), -1)
