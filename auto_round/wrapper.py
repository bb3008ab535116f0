"""What the quantized model carries for people who look at its layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from auto_round.data_type.base import QuantizedTensor
from auto_round.plan import LayerPlan


def attach_qparams(model: nn.Module, tensors: Mapping[str, QuantizedTensor], layers: Mapping[str, LayerPlan]) -> None:
    """Set `scale`, `zp` and the scheme's fields on quantized layers; the only place that stamps modules.

    `scale` is [out, groups]; `zp` is the zero point, a number for symmetric schemes.
    """
    for name, tensor in tensors.items():
        module, scheme = model.get_submodule(name), layers[name].scheme
        module.scale = tensor.scale
        module.zp = 1 << (scheme.bits - 1) if tensor.zero_point is None else tensor.zero_point
        for field in ("bits", "group_size", "sym", "data_type", "act_bits"):
            setattr(module, field, getattr(scheme, field))
