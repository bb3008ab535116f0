"""Tensors that do not stay what they were in the source: fused experts cut into layers, matrices merged or split.

Layers that are quantized are written one by one. What else those source tensors held (biases, layers that are kept) is
written beside them as floats. An ordinary checkpoint (`plain`) gets its experts fused again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from auto_round.algorithms.base import put_weights
from auto_round.modeling.fused_moe.layout import Slice, read_tensor
from auto_round.modeling.fused_moe.replace_modules import gather, release
from auto_round.modeling.name_map import Group
from auto_round.modeling.streaming import StreamedModel, TensorShape
from auto_round.plan import ModelPlan
from auto_round.store import Store


@dataclass(frozen=True)
class Piece:
    """A float tensor made of a source tensor. fused: `parameter` is one of the original module's, not the layers'."""

    parameter: str
    shape: TensorShape
    fused: bool = False


def stem_of(streamed: StreamedModel, layer: str) -> str:
    """The name under which a layer's tensors are stored: the source's name of its weight without `.weight`."""
    return streamed.source_name(f"{layer}.weight").removesuffix(".weight")


def changed_groups(streamed: StreamedModel, plan: ModelPlan) -> list[Group]:
    """Groups of source tensors that cannot stay as they are: a parameter made of them is quantized, or cut out.

    Fused experts are always written one by one, also those that are kept: readers of the result take them apart too.
    """
    quantized = {f"{name}.weight" for name in plan.quantized()}
    return [g for g in streamed.names.groups.values() if g.fused or not quantized.isdisjoint(g.written)]


def pieces(streamed: StreamedModel, plan: ModelPlan, plain: bool = False) -> dict[str, Piece]:
    """Written name → what of the changed groups is stored as floats."""
    quantized = {f"{name}.weight" for name in plan.quantized()}
    source = streamed.source_tensors()
    found = {}
    for group in changed_groups(streamed, plan):
        dtype = source[group.sources[0]].dtype
        if group.fused and plain:
            for fused in group.fused:
                found[_fused_name(group, fused)] = Piece(fused, TensorShape(_fused_shape(streamed, fused), dtype), True)
            continue
        for parameter, written in group.written.items():
            if parameter not in quantized:
                shape = tuple(streamed.model.get_parameter(parameter).shape)
                found[written] = Piece(parameter, TensorShape(shape, dtype))
    return found


def _fused_name(group: Group, fused: str) -> str:
    return group.sources[0] if len(group.sources) == len(group.fused) == 1 else fused


def _owner(streamed: StreamedModel, fused: str) -> str:
    return next(name for name in streamed.replaced if fused.startswith(f"{name}."))


def _fused_shape(streamed: StreamedModel, fused: str) -> tuple[int, ...]:
    module = _owner(streamed, fused)
    return tuple(read_tensor(streamed.replaced[module].original, fused[len(module) + 1 :]).shape)


def refused_layers(streamed: StreamedModel, plan: ModelPlan) -> dict[str, tuple[str, Slice]]:
    """Quantized layers that an ordinary checkpoint holds fused: layer → (written name, where in that tensor)."""
    found = {}
    for group in changed_groups(streamed, plan):
        for parameter in group.written if group.fused else ():
            module = _owner(streamed, parameter)
            place = streamed.replaced[module].origin[parameter[len(module) + 1 :]]
            layer = parameter.removesuffix(".weight")
            if layer in plan.layers and plan.layers[layer].is_quantized:
                found[layer] = (_fused_name(group, f"{module}.{place.parameter}"), place)
    return found


def read_pieces(
    streamed: StreamedModel, plan: ModelPlan, store: Store, plain: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """(written name, value) of pieces, block by block."""
    wanted = pieces(streamed, plan, plain)
    by_block: dict[str | None, list[str]] = {}
    for written, piece in wanted.items():
        by_block.setdefault(streamed.block_of(piece.parameter), []).append(written)
    for block, names in by_block.items():
        with streamed.loaded(block) if block else contextlib.nullcontext() as module:
            if block and any(wanted[name].fused for name in names) and block in plan.parts:
                layers = plan.quantized(block)
                put_weights(module, block, store.load(block, layers).tensors, layers)
            for written in names:
                yield written, _value(streamed, wanted[written])


def _value(streamed: StreamedModel, piece: Piece) -> torch.Tensor:
    if not piece.fused:
        value = streamed.model.get_parameter(piece.parameter).detach()
        return value.to("cpu", piece.shape.dtype).contiguous()
    module = _owner(streamed, piece.parameter)
    pair = streamed.replaced[module]
    gather(pair.original, pair.new)
    value = read_tensor(pair.original, piece.parameter[len(module) + 1 :]).detach()
    value = value.to("cpu", piece.shape.dtype, copy=True).contiguous()
    release(pair.original, pair.new)
    return value
