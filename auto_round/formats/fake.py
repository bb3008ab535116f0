"""The `fake` format: dequantized weights in an ordinary checkpoint, which every reader of the source model opens.

It shows what quantization does to a model without any kernel. Values are `scale · (code − zero point)` rounded once to
the source dtype, in the source orientation ([in, out] for Conv1D).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from auto_round.data_type.base import QuantizedTensor
from auto_round.formats.base import ExportFormat, TensorShape
from auto_round.plan import LayerInfo, LayerPlan, ModelPlan


class FakeFormat(ExportFormat):
    """Stores one float `weight` per layer; experts that the source holds fused are fused again."""

    plain = True

    def __init__(self, plan: ModelPlan, name: str = "fake"):
        self.plan = plan
        self.name = name

    def layout(self, layer: LayerPlan) -> dict[str, TensorShape]:
        info = layer.info
        shape = (info.out_features, info.in_features)
        return {"weight": TensorShape(shape[::-1] if info.transposed else shape, info.dtype)}

    def pack(self, tensor: QuantizedTensor, info: LayerInfo) -> dict[str, torch.Tensor]:
        weight = tensor.dequantize(info.dtype)
        return {"weight": weight.t().contiguous() if info.transposed else weight}

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: LayerPlan) -> QuantizedTensor | None:
        return None

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        return None
