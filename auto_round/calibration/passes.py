"""A forward of all samples and a backward, with the weights of one block in memory at a time.

The model's own forward decides what enters a block. It runs in pieces (see `calibration.forwards`), here with
gradients, so that whatever lies between blocks has its own; a block is run without them, and computed again when the
gradients of its output are known. So a tensor that many blocks are given, as an encoder's output, needs no rule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from auto_round.calibration.block_io import own_leaf
from auto_round.calibration.feed import sample_length, vocabulary_size
from auto_round.calibration.forwards import Amp, Batch, BlockCall, PausedForward, ReplayError, pausing
from auto_round.calibration.native import Place, logits_of, no_cache
from auto_round.modeling.streaming import StreamedModel

TOKENS = 1024  # of one forward
LOGIT_BYTES = 128 << 20  # of one forward's logits in float32

Watch = Callable[[str, nn.Module], AbstractContextManager]
"""Opened around all that a block does in a pass, with the block's name and module."""
Loss = Callable[[int, torch.Tensor], torch.Tensor]
"""(number of the batch, its logits [tokens, vocabulary]) → the loss of each token [tokens]."""


def joined(samples: Sequence[Batch], model: nn.Module) -> list[Batch]:
    """Samples of equal shape as batches [rows, …] of a size that suits a forward with gradients."""
    groups: dict[tuple, list[Batch]] = {}
    for sample in samples:
        alone = () if set(sample) <= {"input_ids", "attention_mask", "decoder_input_ids"} else (id(sample),)
        groups.setdefault((*alone, *((key, value.shape) for key, value in sample.items())), []).append(sample)
    most = max(1, min(TOKENS, LOGIT_BYTES // (4 * vocabulary_size(model))))
    batches: list[Batch] = []
    for group in groups.values():
        size = max(1, most // sample_length(group[0]))
        parts = (group[begin : begin + size] for begin in range(0, len(group), size))
        batches += [{key: torch.cat([one[key] for one in part]) for key in part[0]} for part in parts]
    return batches


class _Tap(torch.autograd.Function):
    """Hands a block's output on and collects the gradients that come back to it; holds no memory of its own."""

    @staticmethod
    def forward(ctx, value: torch.Tensor, anchor: torch.Tensor, found: _Gradient) -> torch.Tensor:
        ctx.found = found
        return value.data

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        ctx.found.add(gradient)
        return None, None, None


class _Gradient:
    """A sum of gradients of one tensor; None until there is one."""

    def __init__(self):
        self.value: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor) -> None:
        self.value = gradient if self.value is None else self.value + gradient


@dataclass
class _Call:
    """A block call: what it was given, as made by the model's code (`sources`) and as it was then (`values`)."""

    sources: list[Any]
    values: list[Any]
    tree: Any
    outputs: list[_Gradient] = field(default_factory=list)

    def again(self) -> tuple[tuple, dict[str, Any], list[tuple[torch.Tensor, torch.Tensor]]]:
        """(args, kwargs, pairs of source and what stands for it in them) for another call, now with gradients."""
        leaves = [own_leaf(leaf, clone=False) for leaf in self.values]
        wanted = [place for place, source in enumerate(self.sources) if _is_float(source) and source.requires_grad]
        # What comes from embeddings has no gradients, and those within the block are wanted all the same.
        first = [place for place, leaf in enumerate(leaves) if _is_float(leaf)][:1]
        for place in {*wanted, *first}:
            leaves[place] = leaves[place].detach().requires_grad_()
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        return args, kwargs, [(self.sources[place], leaves[place]) for place in wanted]


class Passes:
    """The two passes over a model.

    changes: block calls that write into their own arguments, which are then kept as copies.
    """

    def __init__(self, streamed: StreamedModel, amp: Amp, changes: Mapping[Place, bool]):
        self._streamed, self._amp, self._changes = streamed, amp, changes
        self._anchor = torch.zeros((), requires_grad=True, device=streamed.device)
        self._calls: list[tuple[Place, list[_Call]]] = []

    def run(self, batches: Sequence[Batch], ahead: Watch, back: Watch, loss: Loss) -> tuple[float, int]:
        """Both passes, for the sum of the loss over tokens; that sum, and the number of tokens that count.

        Raises:
            ReplayError: batches take different ways through the model.
        """
        model, device = self._streamed.model, self._streamed.device
        batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
        with pausing(model, self._streamed.blocks), no_cache(model):
            forwards = [PausedForward(_with_gradients(model), batch, self._amp) for batch in batches]
            try:
                for forward in forwards:
                    forward.start()
                total, tokens = 0.0, 0
                while (place := common_place(forwards)) is not None:
                    for number, output in enumerate(self._through(place, forwards, ahead)):
                        forwards[number].resume(output)
                        if forwards[number].call is None:
                            found = _learn(forwards[number], batches[number], functools.partial(loss, number))
                            total, tokens = total + found[0], tokens + found[1]
            finally:
                for forward in forwards:
                    forward.close()
            while self._calls:
                self._back(*self._calls.pop(), back)
        return total, tokens

    def _through(self, place: Place, forwards: list[PausedForward], watch: Watch) -> list[Any]:
        """What one block makes of all forwards."""
        calls, given = [], []
        with self._streamed.loaded(place[0]) as module, watch(place[0], module):
            for forward in forwards:
                call = _kept(forward.call, self._changes.get(place, False))
                with torch.no_grad(), self._amp():
                    leaves, tree = pytree.tree_flatten(module(*forward.call.args, **forward.call.kwargs))
                for index, leaf in enumerate(leaves):
                    if _is_float(leaf):
                        call.outputs.append(_Gradient())
                        leaves[index] = _Tap.apply(leaf, self._anchor, call.outputs[-1])
                calls.append(call)
                given.append(pytree.tree_unflatten(leaves, tree))
        self._calls.append((place, calls))
        return given

    def _back(self, place: Place, calls: list[_Call], watch: Watch) -> None:
        """Compute a block again, and carry the gradients of its outputs to its inputs and to what made these."""
        with self._streamed.loaded(place[0]) as module, watch(place[0], module):
            while calls:
                call = calls.pop(0)
                args, kwargs, pairs = call.again()
                with torch.enable_grad(), self._amp():
                    made = [leaf for leaf in pytree.tree_leaves(module(*args, **kwargs)) if _is_float(leaf)]
                _backward([(one, found.value) for one, found in zip(made, call.outputs, strict=True)])
                _backward([(source, own.grad) for source, own in pairs])


def _learn(forward: PausedForward, batch: Batch, loss: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, int]:
    """Find the gradients of the loss at the last blocks' outputs; the loss, and the number of tokens."""
    losses = loss(logits_of(forward.output).flatten(0, -2).float())
    forward.output = None
    mask = batch.get("attention_mask")
    if mask is not None and mask.numel() == len(losses):
        losses = losses * mask.flatten()
    total, tokens = losses.sum(), int(mask.sum()) if mask is not None and mask.numel() == len(losses) else len(losses)
    torch.autograd.backward(total, retain_graph=True)
    return total.item(), tokens


def _backward(pairs: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
    """Carry gradients on from these tensors; the way is kept, as a tensor may have gone to several blocks."""
    known = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None and tensor.requires_grad]
    if known:
        tensors, gradients = zip(*known, strict=True)
        torch.autograd.backward(tensors, gradients, retain_graph=True)


def _kept(call: BlockCall, changes: bool) -> _Call:
    values = [leaf.detach().clone() if changes and isinstance(leaf, torch.Tensor) else leaf for leaf in call.leaves]
    return _Call(call.leaves, values, call.tree)


def _with_gradients(model: nn.Module) -> Callable[..., Any]:
    def run(**batch: torch.Tensor) -> Any:
        with torch.enable_grad():
            return model(**batch)

    return run


def common_place(forwards: Sequence[PausedForward]) -> Place | None:
    """The block call that all forwards wait at; None once they are done."""
    places = {None if forward.call is None else forward.call.place for forward in forwards}
    if len(places) > 1:
        names = sorted(str(place[0]) if place else "the end" for place in places)
        raise ReplayError(f"samples take different ways through the model: to {names[0]}, and to {names[1]}")
    return next(iter(places), None)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
