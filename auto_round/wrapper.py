"""What a quantized model carries: rounded inputs where its scheme says so, and attributes for people who look.

Inputs are rounded by forward pre-hooks, so that layers keep their class, their name and their own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from auto_round.data_type import data_type
from auto_round.data_type.base import QuantizedTensor
from auto_round.plan import LayerPlan
from auto_round.schemes import TensorSpec


class InputQuantizer:
    """A forward pre-hook that rounds a layer's first argument as the engine will."""

    def __init__(self, spec: TensorSpec, input_scale: torch.Tensor | None = None):
        self.spec, self.input_scale = spec, input_scale
        self._family = data_type(spec.data_type)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        scale = None if self.input_scale is None else self.input_scale.to(args[0].device)
        return self._family.quantize_input(args[0], self.spec, scale), *args[1:]


def attach_inputs(
    model: nn.Module, layers: Mapping[str, LayerPlan], scales: Mapping[str, torch.Tensor | None]
) -> list[Any]:
    """Let layers whose scheme quantizes activations round their inputs; returns the hooks' handles.

    Layers that already do so are left alone.
    """
    handles = []
    for name, plan in layers.items():
        if plan.scheme.act is None:
            continue
        module = model.get_submodule(name)
        if not any(isinstance(hook, InputQuantizer) for hook in module._forward_pre_hooks.values()):
            handles.append(module.register_forward_pre_hook(InputQuantizer(plan.scheme.act, scales.get(name))))
    return handles


@contextlib.contextmanager
def quantized_inputs(
    model: nn.Module, layers: Mapping[str, LayerPlan], scales: Mapping[str, torch.Tensor | None]
) -> Iterator[None]:
    """While open, layers whose scheme quantizes activations round their inputs. scales: layer → its fixed scale."""
    handles = attach_inputs(model, layers, scales)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
