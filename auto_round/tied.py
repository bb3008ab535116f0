"""Quantized weights that are not a block's own: of layers tied to another block's, and of those outside all blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from auto_round.algorithms.base import oriented, put_weights
from auto_round.plan import OUTSIDE, ModelPlan
from auto_round.store import Store
from auto_round.utils.model import tied_layers


@torch.no_grad()
def put_tied(model: nn.Module, plan: ModelPlan, store: Store, block: str) -> None:
    """Write the dequantized weights of other blocks' layers into the layers of a block that are tied to them."""
    for name, home in tied_layers(model).items():
        if not name.startswith(f"{block}.") or home not in plan.layers or not plan.layers[home].is_quantized:
            continue
        part = plan.layers[home].info.block
        if part is None or part == block or not store.has(part):
            continue
        value = store.load(part, {home: plan.layers[home]}, learned=False).tensors[home].dequantize()
        parameter = model.get_submodule(name).weight
        parameter.copy_(oriented(value.to(parameter.dtype), plan.layers[home]))


@contextlib.contextmanager
def quantized_outside(model: nn.Module, plan: ModelPlan, store: Store) -> Iterator[None]:
    """While open, layers outside the blocks (an embedding, an lm_head) have their quantized weights."""
    layers = plan.quantized(OUTSIDE)
    kept = {name: model.get_submodule(name).weight.clone() for name in layers}
    if layers:
        put_weights(model, "", store.load(OUTSIDE, layers).tensors, layers)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                model.get_submodule(name).weight.copy_(weight)
