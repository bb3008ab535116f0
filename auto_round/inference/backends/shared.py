"""A layer whose packed weight is another layer's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class SharedLinear(nn.Module):
    """Runs another layer. It holds nothing itself, so that loaders look for the tensors in one place only."""

    def __init__(self, home: nn.Module):
        super().__init__()
        self.__dict__["_home"] = home  # not a child: its tensors are stored under its own name

    @property
    def weight(self) -> torch.Tensor:
        return self._home.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self._home.bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._home(*args, **kwargs)
