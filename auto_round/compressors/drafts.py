"""Layers for multi-token prediction: blocks that a checkpoint holds and Transformers does not instantiate.

Engines run them to guess several tokens at once. Nothing here can run them, so they are told by their names: a block
beyond the last one (`model.layers.61`), or one in a module called `mtp…` or `…nextn…`, and in it the layers that the
model's own blocks have. What joins such a block to the model (`eh_proj`, `fc`, `input_proj`, a head, an
embedding, norms, routers) has no such counterpart, and engines read it as floats.

They are rounded to nearest with 8 bits, from the checkpoint's own tensors. That changes their guesses hardly at all,
and a wrong guess costs time, never a token, since engines check each one with the model itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from auto_round.algorithms import algorithm
from auto_round.algorithms.base import BlockTask
from auto_round.compressors.weights import check_finite
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import DRAFT, LayerInfo, LayerPlan, ModelPlan
from auto_round.ranks import Ranks
from auto_round.settings import TuneSettings
from auto_round.store import Store

_NUMBER = re.compile(r"^\d+$")


# ---- which they are ----


def draft_layers(streamed: StreamedModel, layers: Iterable[LayerInfo]) -> list[LayerInfo]:
    """Linear layers of a checkpoint's prediction blocks; `block` is the block's stored name.

    Args:
        layers: those of the model, with the names under which they are stored.
    """
    source = streamed.source_tensors()
    unused = [name for name in streamed.names.unused if name.endswith(".weight") and len(source[name].shape) == 2]
    if not unused:
        return []
    inside = [info for info in layers if info.block is not None and not info.role]
    roles = {role for info in inside if (role := _role_in_block(info))}
    counts = _stack_lengths(inside)
    found = []
    for name in unused:
        stem, (rows, columns) = name.removesuffix(".weight"), source[name].shape
        block = _block_of(stem, roles)
        if block is None or not source[name].dtype.is_floating_point or not _is_draft(block, counts):
            continue
        bias = f"{stem}.bias" in source
        found.append(LayerInfo(stem, rows, columns, block, has_bias=bias, dtype=source[name].dtype, role=DRAFT))
    return found


def _anonymous(parts: Sequence[str]) -> tuple[str, ...]:
    """Components of a name without the numbers of experts."""
    return tuple("#" if _NUMBER.match(part) else part for part in parts)


def _role_in_block(info: LayerInfo) -> tuple[str, ...] | None:
    """A layer's name within its block, where the checkpoint calls it so, too."""
    own = info.name[len(info.block) + 1 :]
    return _anonymous(own.split(".")) if f".{info.stem}".endswith(f".{own}") else None


def _block_of(stem: str, roles: set[tuple[str, ...]]) -> str | None:
    """What stands before a layer's role in its name; the longest role counts."""
    parts = stem.split(".")
    return next((".".join(parts[:at]) for at in range(1, len(parts)) if _anonymous(parts[at:]) in roles), None)


def _stack_lengths(layers: Iterable[LayerInfo]) -> dict[str, int]:
    """Stored prefix of a stack of numbered blocks → one more than the highest number."""
    counts: dict[str, int] = {}
    for info in layers:
        own = info.name[len(info.block) + 1 :]
        prefix, _, number = info.stem.removesuffix(f".{own}").rpartition(".")
        if _NUMBER.match(number):
            counts[prefix] = max(counts.get(prefix, 0), int(number) + 1)
    return counts


def _is_draft(block: str, counts: dict[str, int]) -> bool:
    prefix, _, number = block.rpartition(".")
    beyond = bool(_NUMBER.match(number)) and prefix in counts and int(number) >= counts[prefix]
    return beyond or any(part.startswith("mtp") or "nextn" in part for part in block.lower().split("."))


# ---- their codes ----


def quantize_drafts(streamed: StreamedModel, plan: ModelPlan, store: Store, tune: TuneSettings, ranks: Ranks) -> None:
    """Put the codes of the plan's prediction blocks into the store, by the main rank, a block at a time.

    Raises:
        ValueError: a weight holds NaN or Inf; names it.
    """
    for part in plan.drafts:
        layers = plan.quantized(part)
        if ranks.main and store.recover(part, layers) is None:
            module = _module_of(streamed, layers)
            check_finite(module, "", layers)
            store.save(part, algorithm("rtn")(BlockTask("", module, layers, tune, tune.seed)))
    ranks.barrier()


def _module_of(streamed: StreamedModel, layers: dict[str, LayerPlan]) -> nn.Module:
    """Modules of these names that hold the layers' weights."""
    root = nn.Module()
    for name in layers:
        *path, last = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        layer = nn.Module()
        weight = streamed.read_source(f"{name}.weight").to(streamed.device)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        owner.add_module(last, layer)
    return root
