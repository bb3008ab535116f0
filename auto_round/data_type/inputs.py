"""Rounding of what enters a layer, as engines do it: over groups of channels, with gradients passed straight through.

A family brings the arithmetic of one group; this file cuts activations into groups and into parts that stay in the
cache, since the rounding runs on every layer's input in every step of the tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

CPU_PART = 1 << 17  # elements handled at once: several float32 buffers of this size fit in a cache
DEVICE_PART = 1 << 26  # on accelerators starting kernels costs more than memory


class StraightThrough(torch.autograd.Function):
    """function(x), bit for bit, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x, function):
        return function(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def parts(tensor: torch.Tensor) -> Iterator[slice]:
    """Slices of the first dimension that are worth handling at once."""
    limit = CPU_PART if tensor.device.type == "cpu" else DEVICE_PART
    rows = max(1, limit * len(tensor) // max(1, tensor.numel()))
    return (slice(begin, begin + rows) for begin in range(0, len(tensor), rows))


def largest_in(groups: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each group: [..., 1] for [..., elements]."""
    return groups.abs().amax(-1, keepdim=True)


def round_input(x: torch.Tensor, group_size: int, round_groups: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`x` [..., in] with each group of channels rounded, in the dtype of `x`; the gradient is that of the identity.

    group_size: channels that share a scale; -1 for a whole token, 0 for the whole tensor. A last group may be short.
    round_groups: rounds float32 [tokens, groups, elements] in place, and returns it.
    """
    return StraightThrough.apply(x, partial(_rounded, group_size=group_size, round_groups=round_groups))


def _rounded(x: torch.Tensor, group_size: int, round_groups: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    if x.numel() == 0:
        return x.clone()
    columns = x.numel() if group_size == 0 else x.shape[-1]
    tokens = x.reshape(-1, columns)
    width = group_size if group_size > 0 else columns
    out = torch.empty_like(tokens)
    for part in parts(tokens):
        groups = tokens[part].to(torch.float32, copy=True)
        if columns % width:
            groups = torch.nn.functional.pad(groups, (0, -columns % width))
        groups = round_groups(groups.view(len(groups), -1, width))
        out[part] = groups.view(len(groups), -1)[:, :columns]
    return out.view(x.shape)
