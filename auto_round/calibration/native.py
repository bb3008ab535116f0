"""The original's own forward on a small batch: what everything after it is compared with.

The batch and its first row run side by side, block by block from the checkpoint. That gives the original's logits and
block outputs; how arguments grow with the batch, so that samples can be joined; and the proof that a block called
again, with its fused parts replaced, computes what the model computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from auto_round.calibration.block_io import Joint, main_tensor, own_leaf
from auto_round.calibration.forwards import Amp, Batch, BlockCall, PausedForward, ReplayError, pausing
from auto_round.modeling.streaming import StreamedModel
from auto_round.special_model_handler import ModelTraits, model_traits
from auto_round.utils.common import all_finite
from auto_round.utils.device import is_out_of_memory

REPLAY_TOKENS = 64  # of the first row, kept of each block's output
REPLAY_TOLERANCE = 2e-2  # relative; batched and unbatched bf16 kernels round differently
Place = tuple[str, int]


@dataclass
class NativeRun:
    """What the original computed on the check batch.

    places: block calls in the order in which they happen; joints: how samples join at each; outputs: the first row's
    hidden state after each (REPLAY_TOKENS tokens); logits: [batch, length, vocabulary];
    replacement_error: largest relative difference that replaced modules made to a block's output.
    """

    batch: Batch
    logits: torch.Tensor | None = None
    places: list[Place] = field(default_factory=list)
    joints: dict[Place, Joint] = field(default_factory=dict)
    outputs: dict[Place, torch.Tensor] = field(default_factory=dict)
    replacement_error: float = 0.0
    row: Batch = field(init=False)

    def __post_init__(self):
        self.row = first_row(self.batch)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Blocks in the order of their first call."""
        return tuple(dict.fromkeys(block for block, _ in self.places))

    def first_not_finite(self) -> str | None:
        """The first block whose output holds NaN or Inf, as far as it was kept."""
        return next((block for (block, _), output in self.outputs.items() if not all_finite(output)), None)


@contextlib.contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    """Run without key-value caches: they would carry state from one call of a block to the next."""
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    for config in list(configs.values()):
        for key in getattr(config, "sub_configs", None) or {}:
            sub = getattr(config, key, None)
            if sub is not None:
                configs[id(sub)] = sub
    changed = [(c, c.use_cache) for c in configs.values() if getattr(c, "use_cache", None) is not None]
    for config, _ in changed:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in changed:
            config.use_cache = value


def logits_of(output: Any) -> torch.Tensor:
    """The logits in what a model returns."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, torch.Tensor) else main_tensor(output)[1]


@torch.no_grad()
def run_logits(model: nn.Module, batch: Batch, device: torch.device | str) -> torch.Tensor:
    """Logits of a plain forward, on the CPU; random numbers are those that a `PausedForward` gives the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return logits_of(model(**{key: value.to(device) for key, value in batch.items()})).cpu()


def mapped(tensor: torch.Tensor, file: Path) -> torch.Tensor:
    """The same CPU tensor in a mapped file, whose pages the system can take from the process; its name is gone."""
    found = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    file.unlink()
    return found.copy_(tensor)


def first_row(batch: Batch) -> Batch:
    """The batch with its first row alone; itself if it has one, or if its tensors do not agree on the rows."""
    rows = {value.shape[0] for value in batch.values()}
    return {key: value[:1] for key, value in batch.items()} if len(rows) == 1 else batch


def run_native(streamed: StreamedModel, blocks: Sequence[str], batch: Batch, amp: Amp) -> NativeRun:
    """Run the original on `batch`.

    Raises:
        ReplayError: a block does not compute the same when it is called again, or with its fused parts replaced.
    """
    batch = {key: value.to(streamed.device) for key, value in batch.items()}
    run = NativeRun(batch)
    model = streamed.model
    with pausing(model, blocks), no_cache(model):
        whole, row = PausedForward(model, batch, amp), PausedForward(model, run.row, amp)
        try:
            call = whole.start()
            row, single = _start_row(model, run, row, amp)
            while call is not None:
                output, mine = _step(streamed, run, call, single, amp)
                call, single = whole.resume(output), row.resume(mine)
            run.logits = logits_of(whole.output).cpu()
        finally:
            whole.close()
            row.close()
    return run


def _start_row(model: nn.Module, run: NativeRun, row: PausedForward, amp: Amp):
    """The first row's forward; for a model that takes several rows for one sample, the whole batch's again."""
    try:
        return row, row.start()
    except Exception as error:  # whatever a model raises that is given less than it needs
        if is_out_of_memory(error):
            raise
        run.row = run.batch
        row.close()
        row = PausedForward(model, run.batch, amp)
        return row, row.start()


def _step(streamed: StreamedModel, run: NativeRun, call: BlockCall, single: BlockCall | None, amp: Amp):
    """Both forwards' outputs of one block; the row is given the batch's values, so that differences do not add up."""
    if single is None or single.place != call.place:
        raise ReplayError(
            f"a batch reaches {call.block}, its first row alone does not: the model's way depends on data"
        )
    copies = pytree.tree_map(lambda leaf: own_leaf(leaf, clone=True), (call.args, call.kwargs))
    versions = [leaf._version for leaf in call.tensors]
    traits = model_traits(streamed.model)
    arguments = "its type is in mllms_with_limited_bs" if traits.one_by_one else _argument_dims(call, single, traits)
    replaced = streamed.has_replaced(call.block)
    with streamed.loaded(call.block, original=True) as module:
        output = _compute(module, call.args, call.kwargs, amp)
        if not replaced:
            again, mine = _compute(module, *copies, amp), _compute(module, single.args, single.kwargs, amp)
    if replaced:
        with streamed.loaded(call.block) as module:
            again, mine = _compute(module, *copies, amp), _compute(module, single.args, single.kwargs, amp)
    error = _check_again(call, output, again, replaced)
    if replaced:
        run.replacement_error = max(run.replacement_error, error)
    changes = versions != [leaf._version for leaf in call.tensors]
    joint = _joint(call, arguments, output, mine, changes, rows=_rows(run))
    run.places.append(call.place)
    run.joints[call.place] = joint
    row = _row_of(output, mine, joint)
    run.outputs[call.place] = witness(row, joint)
    return output, row


def _rows(run: NativeRun) -> int:
    return next(iter(run.batch.values())).shape[0] // next(iter(run.row.values())).shape[0]


@torch.no_grad()
def _compute(module: nn.Module, args: tuple, kwargs: dict, amp: Amp) -> Any:
    with amp():
        return module(*args, **kwargs)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got - want‖ / ‖want‖."""
    want = want.float()
    return ((got.to(want.device).float() - want).norm() / want.norm().clamp(min=1e-12)).item()


def _check_again(call: BlockCall, output: Any, again: Any, replaced: bool) -> float:
    one, other = main_tensor(output)[1], main_tensor(again)[1]
    error = relative(other, one) if one.shape == other.shape else float("inf")
    if not all_finite(one) or error <= REPLAY_TOLERANCE:
        return error
    if replaced:
        raise ReplayError(
            f"with its fused experts as separate layers {call.block} gives an output {error:.2%} away from the "
            "original's: write an unfuser for its module in auto_round/modeling/fused_moe/ (register_replacement)"
        )
    raise ReplayError(
        f"replaying {call.block} gives an output {error:.2%} away from what the model computed in its own forward: "
        f"the block keeps state between calls, or reads what is not among its arguments ({_names(call)}); give the "
        "model a forward (FORWARDS in auto_round/special_model_handler.py) in which blocks start from the same state"
    )


def _names(call: BlockCall) -> str:
    return ", ".join(dict.fromkeys([*(str(i) for i in range(len(call.args))), *call.kwargs]))


def _argument_dims(call: BlockCall, single: BlockCall, traits: ModelTraits) -> list[int | None] | str:
    """For each leaf the dimension that grows with the batch; a reason where samples cannot be joined."""
    if call.tree != single.tree:
        return "it is called with other arguments for one row"
    dims: list[int | None] = []
    for index, (many, one) in enumerate(zip(call.leaves, single.leaves, strict=True)):
        if not isinstance(many, torch.Tensor) or call.argument_name(index).split("[")[0] in traits.shared_keys:
            dims.append(None)
            continue
        dim = growing_dim(one, many)
        if dim is None and (one.shape != many.shape or not torch.equal(one, many)):
            return f"argument {call.argument_name(index)} depends on the batch without growing with it"
        dims.append(dim)
    return dims


def growing_dim(one: torch.Tensor, many: torch.Tensor) -> int | None:
    """The one dimension in which `many` is larger; None if there is none, or several."""
    if one.dim() != many.dim():
        return None
    grown = [dim for dim, (a, b) in enumerate(zip(one.shape, many.shape, strict=True)) if a != b]
    return grown[0] if len(grown) == 1 else None


def _joint(call, arguments, output, mine, changes: bool, rows: int) -> Joint:
    outputs = [
        growing_dim(one, many) if isinstance(many, torch.Tensor) and isinstance(one, torch.Tensor) else None
        for many, one in zip(pytree.tree_leaves(output), pytree.tree_leaves(mine), strict=False)
    ]
    main = main_tensor(mine)[0]
    dim = outputs[main] if main < len(outputs) else None
    error = float("inf")
    if dim is not None:
        one, many = main_tensor(mine)[1], main_tensor(output)[1]
        error = token_error(one, many.narrow(dim, 0, one.shape[dim]), dim) if all_finite(one) else 0.0
    reason = ""
    if isinstance(arguments, str):
        reason, arguments = arguments, ()
    elif rows == 1:
        reason = "the check batch has one row"
    elif dim is None:
        reason = "its output does not grow with the batch"
    elif error > REPLAY_TOLERANCE:
        reason = f"a batch differs by {error:.2%}"
    return Joint(tuple(arguments), tuple(outputs), not reason, error <= REPLAY_TOLERANCE, changes, reason)


def token_error(got: torch.Tensor, want: torch.Tensor, dim: int) -> float:
    """Median over tokens of the relative difference: a router may send a few tokens elsewhere for a rounding error."""
    want, got = want.float(), got.to(want.device).float()
    others = [d for d in range(want.dim()) if d not in (dim, dim + 1)]
    if not others:
        return relative(got, want)
    return ((got - want).norm(dim=others) / want.norm(dim=others).clamp(min=1e-12)).median().item()


def _row_of(output: Any, mine: Any, joint: Joint) -> Any:
    """The first row of a batch's output, in the form of the row's own; its own where it cannot be cut out."""
    leaves, tree = pytree.tree_flatten(mine)
    whole = pytree.tree_leaves(output)
    if not joint.agrees or len(whole) != len(leaves):
        return mine
    for position, (leaf, dim) in enumerate(zip(leaves, joint.outputs, strict=True)):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and dim is not None:
            leaves[position] = whole[position].narrow(dim, 0, leaf.shape[dim]).clone()
    return pytree.tree_unflatten(leaves, tree)


def witness(output: Any, joint: Joint) -> torch.Tensor:
    """What is kept of a row's output to compare replays with."""
    position, hidden = main_tensor(output)
    dim = token_dim(joint, position, hidden)
    return hidden.narrow(dim, 0, min(REPLAY_TOKENS, hidden.shape[dim])).float().cpu().clone()


def token_dim(joint: Joint, position: int, hidden: torch.Tensor) -> int:
    batch = joint.outputs[position] if position < len(joint.outputs) else 0
    return min((batch or 0) + 1, hidden.dim() - 1)


def check_witness(native: NativeRun, place: Place, output: Any) -> float:
    """Difference between a replayed block's output and the model's own; raises when they differ."""
    want, got = native.outputs[place], witness(output, native.joints[place])
    position, _ = main_tensor(output)
    dim = token_dim(native.joints[place], position, want) - 1
    error = token_error(got, want, max(dim, 0)) if got.shape == want.shape else float("inf")
    if not error <= 2 * REPLAY_TOLERANCE and all_finite(want):
        raise ReplayError(
            f"beside other samples {place[0]} gives an output {error:.2%} away from what the model computed in its "
            "own forward: the model keeps something of a sample in its modules between blocks; add a custom forward "
            "in auto_round/special_model_handler.py"
        )
    return error
