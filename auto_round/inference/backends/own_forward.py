"""Packed layers for subclasses of `nn.Linear` that compute something of their own with the weight.

A grouped projection, for one, reads its weight as several matrices. Such a layer keeps the forward of its class, on a
weight that is dequantized when it is read. A subclass whose forward is an ordinary product needs none of this.
"""

from __future__ import annotations

import copy
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from auto_round.inference.backends import PackedLayer
from auto_round.inference.backends.torch import QuantLinear


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a linear layer's class computes something else than `x Wᵀ + b`; tried on random numbers."""
    forward = type(layer).forward
    if not isinstance(layer, nn.Linear) or forward is nn.Linear.forward:
        return False
    probe = copy.copy(layer)
    probe._parameters = dict(layer._parameters)
    generator = torch.Generator("cpu").manual_seed(
        0
    )  # a default device may be set: models are converted without memory
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            probe._parameters[name] = nn.Parameter(
                torch.randn(parameter.shape, generator=generator, device="cpu"), False
            )
    inputs = torch.randn(2, layer.in_features, generator=generator, device="cpu")
    try:
        with torch.no_grad():
            got = forward(probe, inputs)
    except Exception:  # it wants other inputs than a linear layer
        return True
    want = F.linear(inputs, probe.weight, probe.bias)
    return not (isinstance(got, torch.Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-3))


class OwnForwardLinear(QuantLinear):
    """A packed layer that runs the forward of the class it stands for."""

    backend = "torch"
    original_class: type[nn.Module] = nn.Linear

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            attribute = getattr(self.original_class, name)
            return MethodType(attribute, self) if isinstance(attribute, FunctionType) else attribute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.original_class.forward(self, *args, **kwargs)


@cache
def _variant(original: type[nn.Module]) -> type[OwnForwardLinear]:
    return type(f"Quant{original.__name__}", (OwnForwardLinear,), {"original_class": original})


def keep_forward(layer: PackedLayer, old: nn.Module) -> OwnForwardLinear:
    """A packed layer with the forward and the plain attributes of `old`."""
    new = _variant(type(old))(layer)
    for name, value in old.__dict__.items():
        if not name.startswith("_") and name not in new.__dict__:
            new.__dict__[name] = value
    return new
