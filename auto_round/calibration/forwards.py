"""Forwards of a model that pause wherever a block is called.

A model's own forward decides what a block is given: masks, rotary tables, per-layer inputs, an encoder's output, states
handed from block to block. So the forward itself is kept: every sample runs in a greenlet that stops at each call of a
block, hands over the arguments, and goes on with whatever it is given as the block's output. Nothing is assumed about
how blocks are wired; what the code between two blocks does is done by that code.

Samples are paused at the same call, so that one block's weights are needed at a time. Memory holds what the paused
forwards hold: the hidden states of every sample (in a file when they exceed a budget, see `Pager`), and tensors that
are equal for all samples once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import greenlet
import torch
from torch import nn
from torch.utils import _pytree as pytree

from auto_round.calibration.pager import Pager

Batch = Mapping[str, torch.Tensor]
Amp = Callable[[], AbstractContextManager]


class ReplayError(RuntimeError):
    """A block called on its own would not compute what the model computes; names the block and the argument."""


@dataclass
class BlockCall:
    """One call of a block: its name, how often it was called before in the same forward, and its arguments."""

    block: str
    turn: int
    args: tuple
    kwargs: dict[str, Any]
    leaves: list[Any] = field(init=False)
    tree: Any = field(init=False)

    def __post_init__(self):
        self.leaves, self.tree = pytree.tree_flatten((self.args, self.kwargs))

    @property
    def place(self) -> tuple[str, int]:
        return self.block, self.turn

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]

    def argument_name(self, index: int) -> str:
        """`attention_mask`, `0`, `position_embeddings[1]`: where a leaf stands in the call."""
        args, kwargs = pytree.tree_unflatten(list(range(len(self.leaves))), self.tree)
        for key, value in [*enumerate(args), *kwargs.items()]:
            places = pytree.tree_leaves(value)
            if index in places:
                return f"{key}" if len(places) == 1 else f"{key}[{places.index(index)}]"
        return f"#{index}"


@contextlib.contextmanager
def pausing(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Let forwards that run in a `PausedForward` stop at these blocks; called otherwise, blocks run as ever."""
    modules = {name: model.get_submodule(name) for name in blocks}

    def stand_in(name: str, forward: Callable):
        def pause(*args, **kwargs):
            current = greenlet.getcurrent()
            if isinstance(current, _Worker):
                return current.pause(name, args, kwargs)
            return forward(*args, **kwargs)

        return pause

    try:
        for name, module in modules.items():
            module.forward = stand_in(name, module.forward)
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)


class _Worker(greenlet.greenlet):
    """The greenlet of one forward."""

    def __init__(self, run: Callable):
        super().__init__(run)
        self.turns: dict[str, int] = {}

    def pause(self, name: str, args: tuple, kwargs: dict) -> Any:
        turn = self.turns.get(name, 0)
        self.turns[name] = turn + 1
        return self.parent.switch(BlockCall(name, turn, args, kwargs))


class PausedForward:
    """The forward of one batch. `call` is the block call it waits at, None once it is done; then `output` is there."""

    def __init__(self, model: nn.Module, batch: Batch, amp: Amp):
        self._worker = _Worker(lambda: model(**batch))
        self._amp = amp
        self._modes: list[tuple] | None = None  # what the model itself entered: autocast, or gradients
        self.call: BlockCall | None = None
        self.output: Any = None

    def start(self) -> BlockCall | None:
        """Run to the first block. A model that draws random numbers is given the same ones every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._take(self._switch())

    def resume(self, output: Any) -> BlockCall | None:
        """Give the block's output, and run on to the next block."""
        self.call = None
        return self._take(self._switch(output))

    def _switch(self, *values: Any) -> Any:
        self._worker.parent = greenlet.getcurrent()
        with torch.no_grad(), self._amp():
            around = _modes()
            if self._modes is not None:
                _set_modes(self._modes)
            try:
                return self._worker.switch(*values)
            finally:
                self._modes = _modes()
                _set_modes(around)

    def _take(self, value: Any) -> BlockCall | None:
        if self._worker.dead:
            self.output = value
        else:
            self.call = value
        return self.call

    def close(self) -> None:
        if not self._worker.dead and self._worker:
            with torch.no_grad():
                self._worker.throw(greenlet.GreenletExit)
        self.call = self.output = None


def _modes() -> list[tuple]:
    """The state of this thread that contexts inside a model may change."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    cast = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices]
    return [(torch.is_grad_enabled(),), *cast]


def _set_modes(modes: list[tuple]) -> None:
    (gradients,), *cast = modes
    torch.set_grad_enabled(gradients)
    for device, enabled, dtype in cast:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


class Forwards:
    """The forwards of all samples, paused at the same block call.

    Equal tensors are stored once; with a `pager`, what is large and belongs to one sample lies in a file while the
    sample waits (read it through `leaves`).
    """

    def __init__(self, model: nn.Module, samples: Sequence[Batch], amp: Amp, pager: Pager | None = None):
        self._members = [PausedForward(model, sample, amp) for sample in samples]
        self._pager = pager
        self._shared = _SharedTensors()
        self._settled: int | None = None  # the sample that settled last; it is put away when the next one has
        for index, member in enumerate(self._members):
            member.start()
            self._settle(index)

    def __len__(self) -> int:
        return len(self._members)

    def call(self, index: int) -> BlockCall:
        return self._members[index].call

    @property
    def place(self) -> tuple[str, int] | None:
        """(block, turn) that all samples wait at.

        Raises:
            ReplayError: samples wait at different blocks.
        """
        places = {None if m.call is None else m.call.place for m in self._members}
        if len(places) > 1:
            names = sorted(str(place[0]) if place else "the end" for place in places)
            raise ReplayError(
                f"samples take different ways through the model: one is at {names[0]}, another at {names[1]}; "
                "leave the blocks that only some samples reach out with to_quant_block_names"
            )
        return next(iter(places), None)

    def leaves(self, index: int) -> list[Any]:
        """The leaves of a sample's arguments, read back from the file where they lie there."""
        leaves = self._members[index].call.leaves
        return leaves if self._pager is None else [self._pager.read(leaf) for leaf in leaves]

    def wake(self, index: int) -> BlockCall:
        """The sample's call with all its tensors in memory, until `resume`."""
        if self._pager is not None:
            self._pager.restore(index)
        return self._members[index].call

    def rest(self, index: int, output: Any) -> None:
        """Put a woken sample's tensors away again, unless `output`, which the call gave, shares memory with them."""
        call = self._members[index].call
        given = {leaf.untyped_storage().data_ptr() for leaf in call.tensors}
        made = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if not any(leaf.untyped_storage().data_ptr() in given for leaf in made):
            self._evict(index, call)

    def resume(self, index: int, output: Any) -> None:
        self.wake(index)
        self._members[index].resume(output)
        self._settle(index)

    def _settle(self, index: int) -> None:
        """Share what a sample has in common with the one before it, then put the one before away."""
        call = self._members[index].call
        waiting = self._members[self._settled].call if self._settled not in (None, index) else None
        moved = waiting is not None and (call is None or call.place != waiting.place)
        if moved:  # what is shared at the place that this sample left is known until the next line
            self._evict(self._settled, waiting)
        shared = self._shared.join(call) if call is not None else []
        if self._pager is not None:
            for tensor in shared:
                self._pager.forget(tensor)
        if waiting is not None and not moved:
            self._evict(self._settled, waiting)
        self._settled = index

    def _evict(self, index: int, call: BlockCall) -> None:
        if self._pager is not None:
            self._pager.evict(index, [t for t in call.tensors if not self._shared.holds(t)])

    def check_shared(self) -> None:
        """The model must not have changed a tensor that samples share.

        Raises:
            ReplayError: it did.
        """
        self._shared.check()

    def close(self) -> None:
        for index, member in enumerate(self._members):
            if self._pager is not None:
                self._pager.restore(index)
            member.close()
        if self._pager is not None:
            self._pager.close()


class _SharedTensors:
    """Makes equal arguments of different samples share their memory: masks and rotary tables, mostly.

    Only neighbours are compared, and what was found shared before; a value that returns later is merely stored twice.
    """

    def __init__(self):
        self._place: tuple[str, int] | None = None
        self._latest: dict[tuple, torch.Tensor] = {}
        self._shared: dict[tuple, list[torch.Tensor]] = {}
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def join(self, call: BlockCall) -> list[torch.Tensor]:
        """Let the call's tensors use the memory of equal ones; returns those that newly share theirs."""
        joined: list[torch.Tensor] = []
        if call.place != self._place:
            self._place, self._latest, self._shared = call.place, {}, {}
        for position, leaf in enumerate(call.leaves):
            if not isinstance(leaf, torch.Tensor) or leaf.numel() == 0:
                continue
            key = (position, leaf.shape, leaf.stride(), leaf.dtype)
            shared, latest = self._shared.setdefault(key, []), self._latest.get(key)
            base = next((known for known in shared if _same(known, leaf)), None)
            if base is None and latest is not None and latest.data_ptr() and _same(latest, leaf):
                base = latest
                shared.append(base)
            if base is None:
                self._latest[key] = leaf
            elif leaf.data_ptr() != base.data_ptr():
                leaf.data = base.data
                joined += [leaf, base]
        return joined

    def holds(self, tensor: torch.Tensor) -> bool:
        return any(tensor.data_ptr() == known.data_ptr() for known in self._all())

    def _all(self) -> Iterator[torch.Tensor]:
        for tensors in self._shared.values():
            yield from tensors

    def check(self) -> None:
        for tensor, copy in self._copies:
            if not torch.equal(tensor, copy):
                raise ReplayError(
                    f"before {self._place[0] if self._place else 'its end'} the model changes a tensor of shape "
                    f"{tuple(tensor.shape)} in place that was passed to blocks: samples cannot share it"
                )
        known = {tensor.data_ptr(): (tensor, copy) for tensor, copy in self._copies}
        self._copies = [known.get(t.data_ptr()) or (t, t.clone()) for t in self._all()]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)
