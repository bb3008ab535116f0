"""Algorithms: one file each, named in `ALGORITHMS`, all with `quantize_block(task) -> BlockResult`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from auto_round.algorithms.tuning import Rule
    from auto_round.settings import TuneSettings

ALGORITHMS: dict[str, str] = {
    "rtn": "auto_round.algorithms.rtn",
    "signround": "auto_round.algorithms.signround",
    "adamround": "auto_round.algorithms.adamround",
}
ALIASES: dict[str, str] = {
    "auto_round": "signround",
    "autoround": "signround",
    "sign_round": "signround",
    "adam": "adamround",
}


def algorithm(name: str) -> Callable:
    """The `quantize_block` function of an algorithm, by name or alias.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    return _module(name).quantize_block


def state_bytes(name: str, settings: TuneSettings) -> int:
    """Bytes that an algorithm keeps of each weight between steps, beside what is tuned; 0 if it takes no steps."""
    return getattr(_module(name), "state_bytes", lambda settings: 0)(settings)


def rule(name: str, settings: TuneSettings) -> Callable[[], Rule] | None:
    """What makes a rule by which an algorithm moves parameters; None if it takes no steps."""
    made = getattr(_module(name), "RULE", None)
    return None if made is None else functools.partial(made, settings)


def _module(name: str) -> ModuleType:
    key = ALIASES.get(name.lower(), name.lower())
    if key not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}: known are {', '.join(ALGORITHMS)}")
    return importlib.import_module(ALGORITHMS[key])
