"""Layers that share a weight with a layer of another block: quantized once, in that other block."""

from __future__ import annotations

import torch
from torch import nn

from auto_round.algorithms.base import oriented
from auto_round.plan import ModelPlan
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
        value = store.load(part, {home: plan.layers[home]}).tensors[home].dequantize()
        parameter = model.get_submodule(name).weight
        parameter.copy_(oriented(value.to(parameter.dtype), plan.layers[home]))
