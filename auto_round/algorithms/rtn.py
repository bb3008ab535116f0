"""Rounding to nearest, with min/max scales or with searched ones (no tuning of the rounding)."""

from __future__ import annotations

import torch

from auto_round.algorithms.base import BlockTask
from auto_round.algorithms.exchange import exchanged
from auto_round.data_type import data_type
from auto_round.store import BlockResult


@torch.no_grad()
def quantize_block(task: BlockTask) -> BlockResult:
    """Codes of every layer of the block; `settings.search` picks the scale by importance-weighted error.

    Layers do not depend on each other, so each rank does some of them.
    """
    mine = task.ranks.mine({name: layer.info.numel for name, layer in task.layers.items()})
    own = {name: data_type(task.spec(name).data_type).quantize(task.of(name)) for name in mine}
    return BlockResult(exchanged(own, {name: task.spec(name) for name in task.layers}, task.ranks))
