"""What layers over packed codes have in common, whatever their tensors are called and however they are read.

They know which of their tensors arrived, never cast them, and show a dequantized weight to models that look at it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from auto_round.formats.base import TensorShape
from auto_round.inference.backends import PackedLayer


class PackedLinear(nn.Module):
    """A linear layer [out, in] over the buffers `shapes`, with `bias` [out] if the layer has one."""

    backend = ""
    backend_reason = ""  # why this backend was chosen, in words

    def __init__(self, layer: PackedLayer, shapes: Mapping[str, TensorShape]):
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.shapes = dict(shapes)
        self._loaded: set[str] = set()
        self._ready = False
        for name, shape in shapes.items():
            # Not `register_buffer`: it refuses `weight`, which is a property here.
            self._buffers[name] = torch.empty(shape.shape, dtype=shape.dtype)
        bias = nn.Parameter(torch.empty(layer.out_features, dtype=layer.dtype), requires_grad=False)
        self.bias = bias if layer.has_bias else None

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight [out, in], computed on every access (models read its dtype, or fold it).

        Before the checkpoint is loaded it is an empty stand-in, marked as initialized: a model's `_init_weights` may
        reach for the weights of its children and must leave them alone.
        """
        if self._ready:
            return self.dequantize(self.layer.dtype)
        stand_in = torch.empty(self.out_features, self.in_features, dtype=self.layer.dtype, device="meta")
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
        return stand_in

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] in `dtype`."""
        raise NotImplementedError

    def post_init(self) -> None:
        """Check that everything arrived, once the checkpoint is loaded.

        Raises:
            ValueError: a tensor is missing, has the wrong shape, or holds scales that are not finite.
        """
        for name, shape in self.shapes.items():
            self._check(name, self._buffers[name], tuple(shape.shape))
            if self._buffers[name].dtype != shape.dtype:  # a model that keeps parts in float32 had it cast, losslessly
                self._buffers[name] = self._buffers[name].to(shape.dtype)
        if self.bias is not None:
            self._check("bias", self.bias, (self.out_features,))
        self._ready = True

    def _check(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        if name not in self._loaded or tensor.is_meta or tuple(tensor.shape) != shape:
            there = f"has {self.layer.name}.{name} of shape {list(tensor.shape)}"
            raise ValueError(
                f"the checkpoint {there if name in self._loaded else f'has no {self.layer.name}.{name}'}, and "
                f"{list(shape)} was expected: its quantization_config does not describe its weights"
            )
        if "scale" in name and tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise ValueError(f"{self.layer.name}.{name} holds NaN or Inf: the checkpoint is damaged")

    def __setattr__(self, name: str, value: Any) -> None:
        # Transformers marks a tensor that it read from a checkpoint before putting it here; one that is missing gets
        # uninitialized memory instead. The mark does not survive moves between devices, so it is noted at once.
        if getattr(value, "_is_hf_initialized", False):
            self._loaded.add(name)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._loaded.update(name for name in (*self._buffers, "bias") if prefix + name in state_dict)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        """Move, but never cast, what came from the file: the codes were decided for these scales."""
        before = {name: self._buffers[name] for name in self.shapes}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if self._buffers[name].dtype != tensor.dtype:
                self._buffers[name] = tensor.to(self._buffers[name].device)
        return self

    def extra_repr(self) -> str:
        return f"{self.layer}, backend={self.backend}"
