"""Rounding to nearest, with min/max scales or with searched ones (no tuning of the rounding)."""

from __future__ import annotations

import torch

from auto_round.algorithms.base import BlockTask
from auto_round.data_type import data_type
from auto_round.store import BlockResult


@torch.no_grad()
def quantize_block(task: BlockTask) -> BlockResult:
    """Codes of every layer of the block; `settings.search` picks the scale by importance-weighted error."""
    tensors = {}
    for name, plan in task.layers.items():
        family = data_type(plan.scheme.data_type)
        spec, weight = plan.scheme.weight, task.weight(name)
        scale, zero = family.start_point(weight, spec, task.importance.get(name), task.settings.search)
        tensors[name] = family.finish(weight, scale, zero, None, spec)
    return BlockResult(tensors)
