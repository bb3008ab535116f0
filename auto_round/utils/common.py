"""Layer types that can be quantized, and lazy imports. Imports nothing of the package."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import nn


class LazyImport:
    """Stands for a module, or an attribute of one, that is imported when it is first used.

    `LazyImport("package.module").name` imports the module and reads `name`;
    `LazyImport("package.module.function")(…)` imports the parent and calls the function.
    """

    def __init__(self, module_name: str):
        self.module_name = module_name
        self._resolved: Any = None

    def resolve(self) -> Any:
        if self._resolved is None:
            try:
                self._resolved = importlib.import_module(self.module_name)
            except ModuleNotFoundError as error:
                parent, _, attribute = self.module_name.rpartition(".")
                if not parent or error.name != self.module_name:
                    raise
                self._resolved = getattr(importlib.import_module(parent), attribute)
        return self._resolved

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.resolve(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.resolve()(*args, **kwargs)


@functools.cache
def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D  # stores its weight [in, out]

    return Conv1D


# Rebound, never mutated, by people who add a type: read it through `is_supported_layer`.
SUPPORTED_LAYER_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, _conv1d())
# Types that the libraries defining them may not be installed for, by class name.
INNER_SUPPORTED_LAYER_TYPES: tuple[str, ...] = ("FP8Linear",)
SUPPORTED_DTYPES: tuple[str, ...] = ("int",)
# Arguments that are the same for every sample in nearly every model. Only a hint: sharing is found by value.
SHARED_CACHE_KEYS: tuple[str, ...] = ("position_ids", "cache_position", "position_embeddings", "cu_seqlens")


def is_supported_layer(module: nn.Module) -> bool:
    """Whether a module holds a 2-D weight that can be quantized (subclasses of the supported types count)."""
    known = isinstance(module, SUPPORTED_LAYER_TYPES) or type(module).__name__ in INNER_SUPPORTED_LAYER_TYPES
    weight = getattr(module, "weight", None) if known else None
    return isinstance(weight, torch.Tensor) and weight.dim() == 2


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight [in, out], as Transformers' Conv1D does."""
    return isinstance(module, _conv1d())
