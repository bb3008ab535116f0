"""Layer types that can be quantized, walks of modules, a look for NaN, lazy imports. Imports nothing of the package."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
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


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of a module and all below it, each once: `named_modules`, in its order, several times as fast.

    That passes every module through a generator for each level above it, and experts make fifty thousand of them.
    """
    seen: set[nn.Module] = set()
    waiting = [(prefix, module)]
    while waiting:
        name, found = waiting.pop()
        if found in seen:
            continue
        seen.add(found)
        yield name, found
        if found._modules:
            lead = f"{name}." if name else ""
            children = [(lead + own, child) for own, child in found._modules.items() if child is not None]
            waiting += reversed(children)


def walk_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of a module and all below it, each once: `named_parameters`, in its order."""
    seen: set[int] = set()
    for name, found in walk(module, prefix):
        for own, parameter in found._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{name}.{own}" if name else own), parameter


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf: its extremes tell, in a tenth of the time of `isfinite` or less.

    Eight-bit floats, which have no extremes in PyTorch, are widened, a part at a time.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    narrow = tensor.dtype.itemsize == 1
    parts = tensor.detach().reshape(-1).split(1 << 20) if narrow else (tensor.detach(),)
    extremes = (torch.stack(torch.aminmax(part.float() if narrow else part)) for part in parts)
    return all(bool(found.isfinite().all()) for found in extremes)


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight [in, out], as Transformers' Conv1D does."""
    return isinstance(module, _conv1d())
