"""Recording what the model really passes to each block.

Two passes. The *native* pass runs the model as it is, block by block from the checkpoint, on a small check batch: it
gives the original's logits and what each block computed inside the model's own forward. The *capture* pass runs the
model's forward with every block standing in for itself (it returns its input), so that all blocks' arguments are
recorded without running a block; the chain of hidden states is computed later, one block at a time. Whether such a
replay equals the model is checked against the native pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from auto_round.calibration.block_io import Activations, BlockCall, Hidden, Placement, Shared, first_tensor
from auto_round.modeling.streaming import StreamedModel

REPLAY_TOKENS = 64  # of the check batch's first sample, kept of each block's output
REPLAY_TOLERANCE = 2e-2  # relative; batched and unbatched bf16 kernels round differently


class ReplayError(RuntimeError):
    """A block called on its own would not compute what the model computes; names the block and the argument."""


class _Stop(Exception):
    """Leaves the model's forward once the last block has been reached."""


Batch = Mapping[str, torch.Tensor]


@dataclass
class RecordedCall:
    """One call of a block as the model made it."""

    leaves: list[Any]
    tree: Any
    hidden: int  # index of the leaf through which the hidden state enters


@dataclass
class NativeRun:
    """What the model computed in its own forward on the check batch."""

    batch: Batch
    calls: dict[str, RecordedCall]
    outputs: dict[str, torch.Tensor]
    tuple_outputs: dict[str, int]
    logits: torch.Tensor


@contextlib.contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    """Run without key-value caches: they would carry state from one call of a block to the next."""
    configs = [getattr(model, "config", None)]
    configs += [getattr(configs[0], key, None) for key in getattr(configs[0], "sub_configs", {})]
    changed = [(c, c.use_cache) for c in configs if getattr(c, "use_cache", None) is not None]
    for config, _ in changed:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in changed:
            config.use_cache = value


@torch.no_grad()
def run_native(streamed: StreamedModel, blocks: Sequence[str], batch: Batch, amp) -> NativeRun:
    """Run the model itself on `batch`, recording calls, outputs and logits."""
    calls: dict[str, RecordedCall] = {}
    outputs: dict[str, torch.Tensor] = {}
    tuples: dict[str, int] = {}
    handles = []
    previous: list[torch.Tensor | None] = [None]
    for name in blocks:
        module = streamed.model.get_submodule(name)

        def enter(module, args, kwargs, name=name):
            calls[name] = _record(args, kwargs, previous[0], name)
            hidden = calls[name].leaves[calls[name].hidden]
            calls[name].leaves[calls[name].hidden] = hidden[:1, :REPLAY_TOKENS].clone()

        def leave(module, args, kwargs, output, name=name):
            tuples[name] = len(output) if isinstance(output, (tuple, list)) else 0
            previous[0] = first_tensor(output)
            outputs[name] = previous[0][:1, :REPLAY_TOKENS].clone()

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        with streamed.streaming() as model, no_cache(model), amp():
            logits = model(**_to(batch, streamed.device)).logits
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name in blocks if name not in calls]
    if missed:
        raise ReplayError(f"the model's forward never calls {missed[0]}: leave it out with to_quant_block_names")
    return NativeRun(batch, calls, outputs, tuples, logits.cpu())


@torch.no_grad()
def record_calls(streamed: StreamedModel, native: NativeRun, batch: Batch, amp) -> dict[str, RecordedCall]:
    """Arguments of every block for `batch`, without running a block. Hidden states after the first are stand-ins."""
    calls: dict[str, RecordedCall] = {}
    names = list(native.calls)
    previous: list[torch.Tensor | None] = [None]

    def stand_in(name: str):
        def forward(*args, **kwargs):
            calls[name] = _record(args, kwargs, previous[0], name)
            if name == names[-1]:
                raise _Stop
            hidden = calls[name].leaves[calls[name].hidden]
            previous[0] = hidden.view_as(hidden)  # a new object, to be recognised where it comes in again
            rest = native.tuple_outputs[name]
            return (previous[0], *[None] * (rest - 1)) if rest else previous[0]

        return forward

    modules = {name: streamed.model.get_submodule(name) for name in names}
    try:
        for name, module in modules.items():
            module.forward = stand_in(name)
        with no_cache(streamed.model), amp(), contextlib.suppress(_Stop):
            streamed.model(**_to(batch, streamed.device))
    finally:
        for module in modules.values():
            del module.forward
    return calls


def _record(args: tuple, kwargs: dict, previous: torch.Tensor | None, name: str) -> RecordedCall:
    leaves, tree = pytree.tree_flatten((args, kwargs))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    if previous is None:
        hidden = next((i for i in tensors if leaves[i].is_floating_point()), None)
    else:
        hidden = next((i for i in tensors if leaves[i] is previous), None)
    if hidden is None:
        raise ReplayError(
            f"{name} does not take the previous block's output as it is: the model changes it in between, so the "
            "block cannot be replayed alone; leave it out with to_quant_block_names, or add a custom forward in "
            "auto_round/special_model_handler.py"
        )
    return RecordedCall(leaves, tree, hidden)


def check_arguments(native: NativeRun, replay: Mapping[str, RecordedCall]) -> None:
    """Compare the recorded arguments with those of the native pass.

    Raises:
        ReplayError: names the block and the argument that depends on more than the previous block's output.
    """
    for name, call in native.calls.items():
        mine = replay[name]
        if mine.tree != call.tree:
            raise ReplayError(f"{name} is called with other arguments when blocks before it do not run")
        for index, (one, other) in enumerate(zip(call.leaves, mine.leaves, strict=True)):
            if index == call.hidden or not isinstance(one, torch.Tensor):
                continue
            if one.shape != other.shape or not torch.equal(one, other):
                raise ReplayError(
                    f"{name}: argument {argument_name(call, index)} depends on what earlier blocks computed, so the "
                    "block cannot be replayed alone: add a custom forward in auto_round/special_model_handler.py"
                )


def argument_name(call: RecordedCall, index: int) -> str:
    """`attention_mask`, `0`, `position_embeddings[1]`: where a leaf stands in the call."""
    args, kwargs = pytree.tree_unflatten(list(range(len(call.leaves))), call.tree)
    for key, value in [*enumerate(args), *kwargs.items()]:
        places = pytree.tree_leaves(value)
        if index in places:
            return f"{key}" if len(places) == 1 else f"{key}[{places.index(index)}]"
    return f"#{index}"


def check_output(native: NativeRun, name: str, output: torch.Tensor) -> float:
    """Relative difference between a replayed block's output and the model's own; raises when they differ."""
    want = native.outputs[name].float()
    got = output[:1, :REPLAY_TOKENS].to(want.device).float()
    error = ((got - want).norm() / want.norm().clamp(min=1e-12)).item()
    if not error <= REPLAY_TOLERANCE:
        raise ReplayError(
            f"replaying {name} gives an output {error:.2%} away from what the model computed in its own forward: the "
            "block keeps state between calls, or reads what is not among its arguments"
        )
    return error


@dataclass
class Captured:
    """Arguments of every block for all samples, and what enters the first one."""

    calls: dict[str, BlockCall]
    first_hidden: Activations
    hidden_dim: int


def capture(
    streamed: StreamedModel, native: NativeRun, samples: Sequence[Batch], amp, placement: Placement
) -> Captured:
    """Record every sample on its own, then join them: equal values are stored once."""
    calls: dict[str, BlockCall] = {}
    hidden: Activations | None = None
    dims = _batch_dims(streamed, native, samples, amp)
    first = next(iter(native.calls))
    for index, sample in enumerate(samples):
        recorded = record_calls(streamed, native, sample, amp)
        entering = recorded[first].leaves[recorded[first].hidden].detach()
        if hidden is None:
            hidden = placement.new("clean", len(samples), len(samples) * entering.nbytes)
        hidden.put(index, entering)
        for name, call in recorded.items():
            if name not in calls:
                calls[name] = BlockCall(call.tree, [_leaf(call, i, dims[name]) for i in range(len(call.leaves))])
            _add_sample(calls[name], call, name)
    return Captured(calls, hidden, dims[first][native.calls[first].hidden] or 0)


def _add_sample(known: BlockCall, call: RecordedCall, name: str) -> None:
    for position, (slot, leaf) in enumerate(zip(known.leaves, call.leaves, strict=True)):
        if isinstance(slot, Hidden):
            continue
        if isinstance(slot, Shared) != isinstance(leaf, torch.Tensor):
            raise ReplayError(
                f"{name}: argument {argument_name(call, position)} is a tensor for some samples and not for others: "
                "give all samples the same keys and length"
            )
        if isinstance(slot, Shared):
            slot.add(leaf.detach().cpu())


def _leaf(call: RecordedCall, index: int, dims: list[int | None]) -> Any:
    if index == call.hidden:
        return Hidden()
    leaf = call.leaves[index]
    return Shared(batch_dim=dims[index]) if isinstance(leaf, torch.Tensor) else leaf


def _batch_dims(
    streamed: StreamedModel, native: NativeRun, samples: Sequence[Batch], amp
) -> dict[str, list[int | None]]:
    """Which dimension of each tensor argument grows with the batch, seen by calling the model with one and two."""
    one = record_calls(streamed, native, samples[0], amp)
    doubled = {key: torch.cat([value, value]) for key, value in samples[0].items()}
    two = record_calls(streamed, native, doubled, amp)
    dims: dict[str, list[int | None]] = {}
    for name, call in one.items():
        dims[name] = [
            _growing_dim(a, b) if isinstance(a, torch.Tensor) else None
            for a, b in zip(call.leaves, two[name].leaves, strict=True)
        ]
    return dims


def _growing_dim(one: torch.Tensor, two: torch.Tensor) -> int | None:
    return next((dim for dim, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if b == 2 * a), None)


def _to(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    return {key: value.to(device) for key, value in batch.items()}
