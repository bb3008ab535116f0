"""SignRound (arXiv 2309.05516): rounding offsets and clipping ranges move by the sign of their gradient."""

from __future__ import annotations

import torch

from auto_round.algorithms.base import BlockTask
from auto_round.algorithms.tuning import pieces, tune_block
from auto_round.settings import TuneSettings
from auto_round.store import BlockResult


def quantize_block(task: BlockTask) -> BlockResult:
    """Tune every layer of the block together and return its codes."""
    return tune_block(task, SignDescent(task.settings))


def state_bytes(settings: TuneSettings) -> int:
    """Of each weight: the momentum."""
    return 2 if settings.momentum else 0


class SignDescent:
    """p ← p − lr · decay · sign(b), where b ← momentum · b + gradient, kept in bfloat16: it is its sign that counts."""

    def __init__(self, settings: TuneSettings):
        self.momentum = settings.momentum
        self.rates = {"value": settings.rounding_lr, "clip": settings.clip_lr}
        self.kept: dict[int, torch.Tensor] = {}

    def move(self, parameter: torch.Tensor, kind: str, decay: float) -> None:
        kept = parameter.grad
        if self.momentum:
            kept = self.kept.setdefault(id(parameter), torch.zeros_like(parameter, dtype=torch.bfloat16))
        for part, gradient, before in pieces(parameter, parameter.grad, kept):
            if self.momentum:  # in float32 and back: operations on mixed dtypes take several times as long
                gradient = before.float().mul_(self.momentum).add_(gradient)
                before.copy_(gradient)
            part.sub_(gradient.sign(), alpha=self.rates[kind] * decay)


RULE = SignDescent
