"""A quantized tensor as a value, and the grouping that all data types share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from auto_round.schemes import TensorSpec


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight after its codes are decided. Nobody rounds again: exporters move these bits.

    codes: uint8 [out, in], unsigned codes 0 … 2^bits - 1 (a symmetric code q is stored as q + 2^(bits-1)).
    scale: float16 [out, groups], or [1, 1] when the whole tensor is one group; may be negative (full-range symmetric).
    zero_point: uint8, shape of `scale`; None for symmetric, whose zero point is 2^(bits-1).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    spec: TensorSpec

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"codes must be uint8, not {self.codes.dtype}")
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
        """[out, in] weight `scale * (code - zero_point)`; exact in float32, rounded once to `dtype`."""
        rows, columns = self.codes.shape
        groups = self.codes.view(rows, self.scale.shape[1], -1).float()
        if self.zero_point is None:
            groups = groups - float(1 << (self.spec.bits - 1))
        else:
            groups = groups - self.zero_point.float().unsqueeze(-1)
        return (groups * self.scale.float().unsqueeze(-1)).view(rows, columns).to(dtype)

    def per_row(self) -> QuantizedTensor:
        """The same values with a scale for every output row, which file formats can hold."""
        rows = self.codes.shape[0]
        if self.scale.shape[0] == rows:
            return self
        zero_point = None if self.zero_point is None else self.zero_point.expand(rows, -1).contiguous()
        spec = TensorSpec(self.spec.bits, -1, self.spec.sym, self.spec.data_type)
        return QuantizedTensor(self.codes, self.scale.expand(rows, -1).contiguous(), zero_point, spec)


def group_count(in_features: int, group_size: int) -> int:
    """Groups along the input dimension for a group size that divides it (see `plan.fit_group_size`)."""
    return 1 if group_size in (-1, 0) else in_features // group_size


def grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """View [out, in] as [out, groups, inputs per group]; as [1, 1, out·in] for one group per tensor."""
    if group_size == 0:
        return weight.reshape(1, 1, -1)
    return weight.reshape(weight.shape[0], group_count(weight.shape[1], group_size), -1)
