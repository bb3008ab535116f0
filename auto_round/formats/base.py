"""What an export format is: pure functions between quantized tensors and the tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from auto_round.data_type.base import QuantizedTensor
from auto_round.modeling.streaming import TensorShape
from auto_round.plan import LayerInfo, LayerPlan

__all__ = ["ExportFormat", "TensorShape"]


class ExportFormat(Protocol):
    """A file format bound to one plan. It may refuse the plan (when built), never change it.

    Suffixes name a layer's tensors: `qweight` is written as `<layer>.qweight`. Biases are no business of a format:
    they are carried over from the source.
    """

    name: str

    def layout(self, layer: LayerPlan) -> dict[str, TensorShape]:
        """Suffix → shape and dtype of what `pack` returns for this layer."""

    def pack(self, tensor: QuantizedTensor, info: LayerInfo) -> dict[str, torch.Tensor]:
        """Suffix → tensor. Moves bits; rounds nothing."""

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: LayerPlan) -> QuantizedTensor | None:
        """The inverse of `pack`; None where the format stores plain floats (`fake`)."""

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """`quantization_config` for config.json; None where the result is an ordinary checkpoint."""
