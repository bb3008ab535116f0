"""The reference for layers of small floats, and for layers whose inputs are quantized, too: every layout, any device.

The weight is dequantized in float32 and rounded once to the dtype of the input; the input is rounded as the number
family says; then follows an ordinary product. Kernels that multiply the codes themselves may be compared with it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional as F

from auto_round.data_type import data_type
from auto_round.data_type.base import QuantizedTensor
from auto_round.formats.float_layouts import auto_round_layout, input_shapes
from auto_round.inference.backends import PackedLayer
from auto_round.inference.backends.packed import PackedLinear

_CHUNK = {"cpu": 1 << 19}  # weights dequantized at once: float32 temporaries that stay in the cache
_CHUNK_ELSEWHERE = 1 << 24


class FloatLinear(PackedLinear):
    """A linear layer [out, in] whose buffers are those of its layout (`formats/float_layouts.py`)."""

    backend = "torch_float"

    def __init__(self, layer: PackedLayer):
        self.scheme = layer.scheme
        self._layout = auto_round_layout(layer.packing, layer.scheme)
        super().__init__(layer, self._layout.shapes(layer.out_features, layer.in_features, layer.scheme))

    def tensor(self) -> QuantizedTensor:
        """The stored weight as the writer had it."""
        return self._layout.unpack({name: self._buffers[name] for name in self.shapes}, self.scheme)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        tensor = self.tensor()
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=tensor.codes.device)
        high = tensor.spec.group_size[0] if isinstance(tensor.spec.group_size, tuple) else 1
        chunk = _CHUNK.get(weight.device.type, _CHUNK_ELSEWHERE)
        step = max(1, chunk // self.in_features // high) * high
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            weight[rows] = _rows(tensor, rows, high).dequantize()
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]."""
        act = self.scheme.act
        if act is not None:
            scale = next((self._buffers[name].float() for name in input_shapes(act)), None)
            x = data_type(act.data_type).quantize_input(x, act, scale)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantize(x.dtype), bias)


def _rows(tensor: QuantizedTensor, rows: slice, high: int) -> QuantizedTensor:
    """Some outputs of a weight whose scales are those of `high` outputs each, or one for all."""
    scale = tensor.scale
    if len(scale) > 1:
        scale = scale[rows.start // high : -(-rows.stop // high)]
    return dataclasses.replace(tensor, codes=tensor.codes[rows], scale=scale)
