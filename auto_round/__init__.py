"""Tuned low-bit weight rounding for large language models. Importing this package changes nothing and loads nothing."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.17.0.dev0"

_WHERE = {
    "AutoRound": "auto_round.autoround",
    "AutoRoundAdam": "auto_round.autoround",
    "AutoRoundLLM": "auto_round.autoround",
    "AutoRoundMLLM": "auto_round.autoround",
    "AutoScheme": "auto_round.auto_scheme",
    "QuantizationScheme": "auto_round.schemes",
}
__all__ = [*sorted(_WHERE), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
