"""Rounding tuned by Adam (arXiv 1412.6980): offsets and clipping ranges move by how steady their gradient is.

A step is as long as the gradient's mean is large beside its spread, so offsets whose gradient only wavers stay where
they are, and those of clear direction may cross to codes further away: weights are trained, with their scales, rather
than rounded up or down (compare EfficientQAT, arXiv 2407.11062).
"""

from __future__ import annotations

import torch

from auto_round.algorithms.base import BlockTask
from auto_round.algorithms.tuning import pieces, tune_block
from auto_round.settings import TuneSettings
from auto_round.store import BlockResult

MEAN, SQUARE = 0.9, 0.95  # decay of the moments
VALUE_LR, CLIP_LR = 0.02, 0.01  # steps of offsets, in steps of the grid, and of the factors of ranges
TINY = 1e-20  # keeps 0 / 0 away; far below gradients, which are around 1e-8 and smaller in larger models


def quantize_block(task: BlockTask) -> BlockResult:
    """Tune every layer of the block together and return its codes."""
    return tune_block(task, Adam(task.settings))


def state_bytes(settings: TuneSettings) -> int:
    """Of each weight: two moments."""
    return 4


class Adam:
    """Adam without weight decay; moments are kept in bfloat16."""

    def __init__(self, settings: TuneSettings):
        self.rates = {
            "value": VALUE_LR if settings.lr is None else settings.lr,
            "clip": CLIP_LR if settings.minmax_lr is None else settings.minmax_lr,
        }
        self.moments: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.steps: dict[int, int] = {}

    def move(self, parameter: torch.Tensor, kind: str, decay: float) -> None:
        key = id(parameter)
        if key not in self.moments:
            self.moments[key] = tuple(torch.zeros_like(parameter, dtype=torch.bfloat16) for _ in range(2))
        self.steps[key] = step = self.steps.get(key, 0) + 1
        for part, gradient, mean, square in pieces(parameter, parameter.grad, *self.moments[key]):
            first = mean.float().lerp_(gradient, 1 - MEAN)
            second = square.float().mul_(SQUARE).addcmul_(gradient, gradient, value=1 - SQUARE)
            mean.copy_(first)
            square.copy_(second)
            spread = second.div_(1 - SQUARE**step).sqrt_().add_(TINY)
            part.addcdiv_(first, spread, value=-self.rates[kind] * decay / (1 - MEAN**step))

    def moments_of(self, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and mean square of a parameter's gradients, as they are kept."""
        return self.moments[id(parameter)]

    def restore(self, parameter: torch.Tensor, moments: tuple[torch.Tensor, torch.Tensor], steps: int) -> None:
        """Go on with a parameter that has moved so many times."""
        self.moments[id(parameter)], self.steps[id(parameter)] = moments, steps


RULE = Adam
