"""The calibration samples on their way through the blocks: in the original and in the quantized model, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from auto_round.budget import Working
from auto_round.calibration.block_io import Activations, BlockIO, Inputs, Joint, Placement, main_tensor, micro_batch
from auto_round.calibration.feed import sample_length
from auto_round.calibration.forwards import Amp, Batch, Forwards, pausing
from auto_round.calibration.native import NativeRun, Place, check_witness, no_cache
from auto_round.compressors.backoff import MicroBatch, naming_the_lack
from auto_round.utils.common import all_finite

T = TypeVar("T")


class Chain:
    """All samples' forwards, paused at the block whose turn it is.

    clean: forwards of the original model, with a row of the check batch as the last one, whose outputs are compared
    with what the model computed alone; noisy: forwards of the model with the blocks so far quantized. outside: in which
    the weights that lie before the first block, an embedding's, are the quantized model's. micro: how many samples a
    block is given at once; where memory is refused, they become fewer. spread: see `micro_batch`.
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
        working: Working | None = None,
        note: Callable[[str], None] = lambda text: None,
        spread: float = 1,
    ):
        self._native, self._placement, self._amp = native, placement, amp
        self._quantized_inputs = quantized_inputs
        self.device = placement.device
        self.masks = [_mask(sample) for sample in samples]
        self.lengths = [sample_length(sample) for sample in samples]
        usual = min(micro_batch(self.lengths, self.device, batch_size, spread), len(samples))
        self.micro = MicroBatch((working or Working()).micro(usual), self.device, note)
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(no_cache(model))
        self._stack.enter_context(pausing(model, native.blocks))
        samples = [{key: value.to(self.device) for key, value in sample.items()} for sample in samples]
        with naming_the_lack("taking the samples to the first block"):
            self.clean = self._start(model, [*samples, native.row], "clean")
            self.noisy = self.clean
            if quantized_inputs:
                with outside():
                    self.noisy = self._start(model, samples, "noisy")
        self._outputs: list[Any] = []
        self._targets: Activations | None = None
        self._main = 0
        self._finished = False

    def _start(self, model: nn.Module, samples: Sequence[Batch], name: str) -> Forwards:
        forwards = Forwards(model, samples, self._amp, self._placement.pager(name))
        self._stack.callback(forwards.close)
        forwards.check_shared()
        return forwards

    @property
    def place(self) -> Place | None:
        """The block call that all samples wait at; None after the last one."""
        return None if self._finished else self.clean.place

    @property
    def repeated(self) -> set[str]:
        """Blocks that are called more than once."""
        return {block for block, turn in self._native.places if turn}

    def observe(
        self, module: nn.Module, watch: Callable[[], AbstractContextManager[T]] = contextlib.nullcontext
    ) -> T | None:
        """Run the original block on the original inputs: the wanted outputs.

        watch: opened around the block's calls, anew where they have to begin again; what it gives is returned.

        Raises:
            DoesNotFitError: memory is refused to a single sample.
        """
        joint = self._native.joints[self.place]
        what = f"running the original {self.place[0]}"

        def begin(size: int) -> T | None:
            with watch() as seen:
                self._observe(module, joint, size)
            return seen

        return self._attempt(what, begin, joint, self._most(self.clean, joint))

    def _attempt(self, what: str, run: Callable[[int], T], joint: Joint, most: int | None) -> T:
        """Run with as many samples as memory allows; once, where a call that failed has changed its own arguments."""
        if not joint.changes:
            return self.micro.attempt(what, run, most)
        with naming_the_lack(what):
            return run(min(self.micro.size, most or self.micro.size))

    def _observe(self, module: nn.Module, joint: Joint, size: int) -> None:
        count = len(self.lengths)
        if self._targets is not None:
            self._targets.close()
        self._targets = self._placement.activations(count, "targets")
        self._outputs = [None] * count
        inputs = Inputs(self.clean, joint)
        for part in inputs.split(range(count), size):
            self._observe_part(module, inputs, part, joint)

    def witness(self, module: nn.Module) -> None:
        """Run the original block on the row of the check batch, which is no sample to learn from.

        Raises:
            ReplayError: beside the others, the row gives another output than alone.
        """
        call = self.clean.wake(len(self.lengths))
        self._witness = self._run(module, call.args, call.kwargs)
        check_witness(self._native, self.place, self._witness)

    def _observe_part(self, module: nn.Module, inputs: Inputs, part: list[int], joint) -> None:
        outputs = self._outputs_of(module, self.clean, inputs, part, joint)
        for index, output in zip(part, outputs, strict=True):
            leaves, tree = pytree.tree_flatten(output)
            self._main = main_tensor(output)[0]
            self._check_finite(index, leaves[self._main], "the original")
            self._targets.put(index, leaves[self._main])
            leaves[self._main] = None
            self._outputs[index] = (leaves, tree)
        if len(part) == 1:
            self.clean.rest(part[0], outputs)

    def _check_finite(self, index: int, hidden: torch.Tensor, whose: str) -> None:
        """Refuse a block that gives NaN or Inf for a token that counts: nothing could be learned from then on.

        Raises:
            ValueError: it does; names the block and the sample.
        """
        if all_finite(hidden):
            return
        mask = self.masks[index]
        if (
            mask is not None
            and hidden.shape[:-1] == mask.shape
            and hidden[mask.bool().to(hidden.device)].isfinite().all()
        ):
            return
        raise ValueError(
            f"{self.place[0]} of {whose} gives NaN or Inf for calibration sample {index}: its activations overflow in "
            f"{hidden.dtype}; try model_dtype=bfloat16 or float32, another dataset, or more bits for the blocks before"
        )

    def _outputs_of(self, module: nn.Module, forwards: Forwards, inputs: Inputs, part: list[int], joint) -> list[Any]:
        """The block's output for each sample; one by one with the model's own objects where they cannot be joined."""
        if len(part) == 1:
            call = forwards.wake(part[0])
            return [self._run(module, call.args, call.kwargs)]
        args, kwargs = inputs.arguments(part)
        return _split(self._run(module, args, kwargs), joint.outputs, len(part))

    def _most(self, forwards: Forwards, joint: Joint) -> int | None:
        """How many samples one call may join when its side effects and all its outputs count; None for any number."""
        call = forwards.call(0)
        stateful = any(
            isinstance(part, (dict, list))
            for part in pytree.tree_leaves(
                (call.args, call.kwargs), is_leaf=lambda x: isinstance(x, (dict, list)) and x is not call.kwargs
            )
        )
        return 1 if stateful or not joint.joins or None in joint.outputs else None

    @torch.no_grad()
    def _run(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        with self._amp():
            return module(*args, **kwargs)

    def io(self) -> BlockIO:
        """What an algorithm learns from, once `observe` has run."""
        joint = self._native.joints[self.place]
        inputs = Inputs(self.noisy, joint)
        return BlockIO(inputs, self._targets, joint, self._main, self.lengths, self.masks, self.device, self.micro.size)

    def advance(self, module: nn.Module) -> None:
        """Let every sample run on to the next block: with the observed outputs, and those of the quantized block."""
        joint = self._native.joints[self.place]
        if self.place == self._native.places[-1]:  # what follows, the vocabulary's logits, is nobody's input
            self._finished = True
            return
        if self._quantized_inputs:
            self._advance_noisy(module, joint)
        with naming_the_lack(f"taking the samples on from {self.place[0]}"):
            for index, (leaves, tree) in enumerate(self._outputs):
                leaves[self._main] = self._targets.get(index).to(self.device)
                self.clean.resume(index, pytree.tree_unflatten(leaves, tree))
            self.clean.resume(len(self.lengths), self._witness)
            self.clean.check_shared()
        self._targets.close()

    def _advance_noisy(self, module: nn.Module, joint: Joint) -> None:
        """Each sample that has gone on stays there: what is begun anew is the call that memory was refused to."""
        inputs, most = Inputs(self.noisy, joint), self._most(self.noisy, joint)
        block = self.place[0]
        parts = inputs.split(range(len(self.noisy)), most or self.micro.size)
        while parts:
            part = parts.pop(0)

            def run(size: int, part: list[int] = part) -> list[Any]:
                return self._outputs_of(module, self.noisy, inputs, part[:size], joint)

            outputs = self._attempt(f"running the quantized {block}", run, joint, len(part))
            with naming_the_lack(f"taking the samples on from the quantized {block}"):
                for index, output in zip(part, outputs, strict=False):
                    self._check_finite(index, main_tensor(output)[1], "the quantized model")
                    self.noisy.resume(index, output)
            if len(outputs) < len(part):
                parts.insert(0, part[len(outputs) :])
        self.noisy.check_shared()

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
    """What calibration saw enter a layer: mean square [in] and largest magnitude [1] over so many tokens.

    The mean square is float64 while it is added up, so that the order in which samples come does not show in float32.
    """

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

    latest: list[Any] = []  # what entered the layer before, its state, and what was found of it

    def measured(entered: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Tokens, sums of squares and largest magnitude; found once where several layers are given one tensor."""
        if not latest or latest[0] is not entered or latest[1] != entered._version:
            x = entered.detach().reshape(-1, entered.shape[-1]).float()
            low, high = x.aminmax() if len(x) else (x.new_zeros(()), x.new_zeros(()))
            squares = x.square().sum(0, dtype=torch.float64)
            latest[:] = entered, entered._version, (len(x), squares, torch.maximum(-low, high).reshape(1))
        return latest[2]

    def hook(name: str):
        def collect(module, args):
            tokens, squares, top = measured(args[0])
            if not tokens:
                return
            sums[name] = sums.get(name, 0) + squares
            counts[name] = counts.get(name, 0) + tokens
            largest[name] = torch.maximum(largest[name], top) if name in largest else top

        return collect

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        latest.clear()
        for handle in handles:
            handle.remove()
        found.update({n: LayerInputs(total / counts[n], counts[n], largest[n]) for n, total in sums.items()})
