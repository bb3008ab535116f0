"""What a model's configuration may ask for: no code of its own unless it is trusted, and no sizes that no model has.

Both are looked for before Transformers sees the configuration, which runs the code, or builds the layers, while it
reads. Nested configurations (of a vision tower, say) count as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from auto_round.modeling.reading import AGAIN, UNTRUSTED, CheckpointError

LARGE_PARAMETER = 64 << 20  # bytes
MAX_BUFFER = 2 << 30  # bytes; a table of sines for a million positions has a quarter of it
_UNFILLED = (torch.empty, torch.rand, torch.randn)
_FILLED = (torch.zeros, torch.ones, torch.full, torch.arange, torch.linspace, torch.eye)
_PRODUCTS = (torch.outer, torch.einsum, torch.matmul, torch.mul)
_PRODUCTS += (torch.Tensor.__matmul__, torch.Tensor.__mul__, torch.Tensor.mul)
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
# What a number of this name is counted in → how many of them no model has.
_LIMITS = (
    (re.compile(r"layer|depth|stage"), 1_000),
    (re.compile(r"expert|head|group"), 1_000_000),
    (re.compile(r"size|dim|vocab|embd|rank|channel|d_model|d_ff"), 1 << 24),
    (re.compile(r""), 1 << 40),
)


def check_trusted(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration that makes Transformers run code of the model's folder or of the hub.

    Raises:
        CheckpointError: a model type that only the folder's own code knows, or kernels from the hub.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for part in _mappings(config):
        known = isinstance(part.get("model_type"), str) and part["model_type"] in CONFIG_MAPPING
        if "auto_map" in part and not known:
            raise CheckpointError(f"{file.parent} {UNTRUSTED} (auto_map in {file.name})")
        for key in _KERNELS:
            wanted = part.get(key)
            if any("/" in str(name) for name in (wanted.values() if isinstance(wanted, Mapping) else [wanted])):
                raise CheckpointError(f"{file} asks for code from the hub ({key}: {wanted!r}): {UNTRUSTED}")


def check_sizes(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse numbers of layers, experts and the like that would only be found impossible after hours of building.

    Raises:
        CheckpointError: names the entry.
    """
    for part in _mappings(config):
        for key, value in part.items():
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            limit = next(most for names, most in _LIMITS if names.search(str(key)))
            if abs(value) > limit and not key.endswith(("_id", "_ids", "_size_bytes", "total_size")):
                raise CheckpointError(f"{file}: {key} is {str(value)[:40]}, which no model has: {AGAIN}")


class LimitedTensors(TorchFunctionMode):
    """While it is entered, tensors have sizes that a model's buffers may have.

    Large ones without values of their own are made on the meta device: parameters, which are dropped in any case.

    Raises:
        CheckpointError: another tensor of more than `MAX_BUFFER` bytes is about to be made.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (*_UNFILLED, *_FILLED, *_PRODUCTS):
            return func(*args, **kwargs)
        shape = _planned(func, args, kwargs)
        if shape is not None and shape.nbytes > LARGE_PARAMETER and func in _UNFILLED:
            return shape
        if shape is not None and shape.nbytes > MAX_BUFFER:
            raise CheckpointError(
                f"config.json makes the model compute a tensor of shape {list(shape.shape)}, {shape.nbytes >> 30} GiB, "
                f"as no model does: {AGAIN}"
            )
        return func(*args, **kwargs)


def _planned(func: Any, args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """What a function would return, without its values; None where that is not known before."""
    args = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), args)
    try:
        return func(*args, **kwargs) if func in _PRODUCTS else func(*args, **{**kwargs, "device": "meta"})
    except (RuntimeError, TypeError, ValueError):  # which the call itself raises in its own words
        return None


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """All mappings in a value, itself first."""
    if isinstance(value, Mapping):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value:
        if isinstance(inner, (Mapping, list)):
            yield from _mappings(inner)
