"""Which blocks a model runs on text, seen by running it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from auto_round.calibration.feed import random_text
from auto_round.calibration.forwards import Amp, Batch, PausedForward, pausing
from auto_round.calibration.native import no_cache
from auto_round.modeling.streaming import StreamedModel

PROBE_TOKENS = 16


def called_blocks(streamed: StreamedModel, blocks: Sequence[str], amp: Amp, sample: Batch | None = None) -> list[str]:
    """Blocks in the order in which a forward over `sample`, or a few random tokens, first calls them."""
    return _run(streamed, blocks, amp, sample=sample)


def _run(streamed, blocks, amp, edit=None, mode=None, sample: Batch | None = None) -> list[str]:
    """Run the model block by block. edit: called with (module, block) once it is loaded; mode: entered around it."""
    sample = random_text(streamed.model, 1, PROBE_TOKENS) if sample is None else sample
    batch = {key: value.to(streamed.device) for key, value in sample.items()}
    called: dict[str, None] = {}
    with pausing(streamed.model, blocks), no_cache(streamed.model):
        forward = PausedForward(streamed.model, batch, amp)
        try:
            call = forward.start()
            while call is not None:
                called[call.block] = None
                with streamed.loaded(call.block) as module, torch.no_grad(), amp():
                    if edit is not None:
                        edit(module, call.block)
                    with mode or contextlib.nullcontext():
                        output = module(*call.args, **call.kwargs)
                call = forward.resume(output)
        finally:
            forward.close()
    return list(called)


class _MatrixUse(TorchDispatchMode):
    """Notes which tensors, or casts and views of them, enter matrix products."""

    def __init__(self):
        super().__init__()
        self._names: dict[int, str] = {}
        self._alive: list[torch.Tensor] = []  # a freed storage's address could be another's
        self.used: set[str] = set()

    def watch(self, name: str, tensor: torch.Tensor) -> None:
        self._names[tensor.untyped_storage().data_ptr()] = name

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        names = {self._names.get(tensor.untyped_storage().data_ptr()) for tensor in tensors} - {None}
        kind = operation.overloadpacket.__name__
        if names and any(part in kind for part in ("mm", "linear", "convolution", "attention", "matmul")):
            self.used |= names
        elif names and kind in _COPIES and isinstance(result, torch.Tensor):
            self.watch(next(iter(names)), result)
            self._alive.append(result)
        return result


_COPIES = ("_to_copy", "clone", "contiguous", "cat", "stack", "index", "index_select", "gather", "copy")


def used_as_matrices(streamed: StreamedModel, blocks: Sequence[str], names: Sequence[str], amp: Amp) -> set[str]:
    """Those parameters that enter matrix products in a forward over a few random tokens."""
    use = _MatrixUse()

    def edit(module: nn.Module, block: str) -> None:
        for name, parameter in module.named_parameters(prefix=block):
            if name in names:
                use.watch(name, parameter)

    _run(streamed, blocks, amp, edit, use)
    return use.used


def executed_stacks(stacks: Sequence[Sequence[str]], called: Sequence[str]) -> list[list[str]]:
    """The stacks that are called, in the order in which they are.

    Members that are not (cross-attention on images, in a text decoder) come along, at their places.
    """
    order = {name: position for position, name in enumerate(called)}
    kept = [list(stack) for stack in stacks if not order.keys().isdisjoint(stack)]
    return sorted(kept, key=lambda stack: min(order[name] for name in stack if name in order))
