"""The calibration samples on their way through the blocks: in the original and in the quantized model, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from auto_round.calibration.block_io import Activations, BlockIO, Inputs, Placement, main_tensor, micro_batch
from auto_round.calibration.feed import sample_length
from auto_round.calibration.forwards import Amp, Batch, Forwards, pausing
from auto_round.calibration.native import NativeRun, Place, check_witness, no_cache
from auto_round.calibration.pager import Pager


class Chain:
    """All samples' forwards, paused at the block whose turn it is.

    clean: forwards of the original model, with a row of the check batch as the last one, whose outputs are compared
    with what the model computed alone; noisy: forwards of the model with the blocks so far quantized. outside: in which
    the weights that lie before the first block, an embedding's, are the quantized model's.
    """

    def __init__(
        self,
        model: nn.Module,
        native: NativeRun,
        samples: Sequence[Batch],
        placement: Placement,
        amp: Amp,
        batch_size: int,
        quantized_inputs: bool = True,
        outside: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ):
        self._native, self._placement, self._amp = native, placement, amp
        self._quantized_inputs = quantized_inputs
        self.device = placement.device
        self.masks = [_mask(sample) for sample in samples]
        self.lengths = [sample_length(sample) for sample in samples]
        self._batch = micro_batch(self.lengths, self.device, batch_size)
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(no_cache(model))
        self._stack.enter_context(pausing(model, native.blocks))
        samples = [{key: value.to(self.device) for key, value in sample.items()} for sample in samples]
        spills = placement.spills(len(samples) * self._hidden_bytes())
        self.clean = self._start(model, [*samples, native.row], "clean" if spills else None)
        self.noisy = self.clean
        if quantized_inputs:
            with outside():
                self.noisy = self._start(model, samples, "noisy" if spills else None)
        self._spills = spills
        self._outputs: list[Any] = []
        self._targets: Activations | None = None
        self._main = 0
        self._finished = False

    def _hidden_bytes(self) -> int:
        """Of one sample's hidden state, from what the check batch showed."""
        hidden = next(iter(self._native.outputs.values()))
        return hidden.nbytes * max(self.lengths) // max(1, hidden.shape[-2] if hidden.dim() > 1 else 1)

    def _start(self, model: nn.Module, samples: Sequence[Batch], name: str | None) -> Forwards:
        pager = Pager(self._placement.file(name)) if name else None
        forwards = Forwards(model, samples, self._amp, pager)
        self._stack.callback(forwards.close)
        forwards.check_shared()
        return forwards

    @property
    def place(self) -> Place | None:
        """The block call that all samples wait at; None after the last one."""
        return None if self._finished else self.clean.place

    def observe(self, module: nn.Module) -> None:
        """Run the original block on the original inputs: the wanted outputs.

        Raises:
            ReplayError: beside the others, a row of the check batch gives another output than alone.
        """
        joint = self._native.joints[self.place]
        count = len(self.lengths)
        file = self._placement.file("targets") if self._spills else None
        self._targets = Activations(count, self.device, file)
        self._outputs = [None] * count
        inputs = Inputs(self.clean, joint)
        for part in inputs.split(range(count), self._size(self.clean, joint)):
            self._observe_part(module, inputs, part, joint)
        call = self.clean.wake(count)
        self._witness = self._run(module, call.args, call.kwargs)
        check_witness(self._native, self.place, self._witness)

    def _observe_part(self, module: nn.Module, inputs: Inputs, part: list[int], joint) -> None:
        outputs = self._outputs_of(module, self.clean, inputs, part, joint)
        for index, output in zip(part, outputs, strict=True):
            leaves, tree = pytree.tree_flatten(output)
            self._main = main_tensor(output)[0]
            self._targets.put(index, leaves[self._main])
            leaves[self._main] = None
            self._outputs[index] = (leaves, tree)

    def _outputs_of(self, module: nn.Module, forwards: Forwards, inputs: Inputs, part: list[int], joint) -> list[Any]:
        """The block's output for each sample; one by one with the model's own objects where they cannot be joined."""
        if len(part) == 1:
            call = forwards.wake(part[0])
            return [self._run(module, call.args, call.kwargs)]
        args, kwargs = inputs.arguments(part)
        return _split(self._run(module, args, kwargs), joint.outputs, len(part))

    def _size(self, forwards: Forwards, joint) -> int:
        """How many samples one call may join when its side effects and all its outputs count."""
        call = forwards.call(0)
        stateful = any(
            isinstance(part, (dict, list))
            for part in pytree.tree_leaves(
                (call.args, call.kwargs), is_leaf=lambda x: isinstance(x, (dict, list)) and x is not call.kwargs
            )
        )
        return 1 if stateful or not joint.joins or None in joint.outputs else self._batch

    @torch.no_grad()
    def _run(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        with self._amp():
            return module(*args, **kwargs)

    def io(self) -> BlockIO:
        """What an algorithm learns from, once `observe` has run."""
        joint = self._native.joints[self.place]
        inputs = Inputs(self.noisy, joint)
        return BlockIO(inputs, self._targets, joint, self._main, self.lengths, self.masks, self.device)

    def advance(self, module: nn.Module) -> None:
        """Let every sample run on to the next block: with the observed outputs, and those of the quantized block."""
        joint = self._native.joints[self.place]
        if self.place == self._native.places[-1]:  # what follows, the vocabulary's logits, is nobody's input
            self._finished = True
            return
        if self._quantized_inputs:
            inputs = Inputs(self.noisy, joint)
            for part in inputs.split(range(len(self.noisy)), self._size(self.noisy, joint)):
                for index, output in zip(part, self._outputs_of(module, self.noisy, inputs, part, joint), strict=True):
                    self.noisy.resume(index, output)
            self.noisy.check_shared()
        for index, (leaves, tree) in enumerate(self._outputs):
            leaves[self._main] = self._targets.get(index)
            self.clean.resume(index, pytree.tree_unflatten(leaves, tree))
        self.clean.resume(len(self.lengths), self._witness)
        self.clean.check_shared()
        self._targets.close()

    def close(self) -> None:
        if self._targets is not None:
            self._targets.close()
        self._stack.close()


def _mask(sample: Batch) -> torch.Tensor | None:
    mask = sample.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask


def _split(output: Any, dims: Sequence[int | None], count: int) -> list[Any]:
    leaves, tree = pytree.tree_flatten(output)
    columns = [
        leaf.split(leaf.shape[dim] // count, dim) if isinstance(leaf, torch.Tensor) else [leaf] * count
        for leaf, dim in zip(leaves, dims, strict=True)
    ]
    parts = [list(row) for row in zip(*columns, strict=True)]
    return [
        pytree.tree_unflatten([p.clone() if isinstance(p, torch.Tensor) else p for p in row], tree) for row in parts
    ]


@dataclass(frozen=True)
class LayerInputs:
    """What calibration saw enter a layer: mean square [in] and largest magnitude [1] over so many tokens."""

    mean_square: torch.Tensor
    tokens: int
    largest: torch.Tensor


@contextlib.contextmanager
def inputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, LayerInputs]]:
    """While open, collect what enters each layer; the result is there afterwards, without layers that never ran."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    largest: dict[str, torch.Tensor] = {}
    found: dict[str, LayerInputs] = {}

    def hook(name: str):
        def collect(module, args):
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            if not len(x):
                return
            low, high = x.aminmax()
            top = torch.maximum(-low, high).reshape(1)
            sums[name] = sums.get(name, 0) + x.square().sum(0)
            counts[name] = counts.get(name, 0) + x.shape[0]
            largest[name] = torch.maximum(largest[name], top) if name in largest else top

        return collect

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found.update({n: LayerInputs(total / counts[n], counts[n], largest[n]) for n, total in sums.items()})
