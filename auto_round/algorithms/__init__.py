"""Algorithms: one file each, named in `ALGORITHMS`, all with `quantize_block(task) -> BlockResult`."""

from __future__ import annotations

import importlib
from collections.abc import Callable

ALGORITHMS: dict[str, str] = {
    "rtn": "auto_round.algorithms.rtn",
    "signround": "auto_round.algorithms.signround",
}
ALIASES: dict[str, str] = {"auto_round": "signround", "autoround": "signround", "sign_round": "signround"}


def algorithm(name: str) -> Callable:
    """The `quantize_block` function of an algorithm, by name or alias.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    key = ALIASES.get(name.lower(), name.lower())
    if key not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}: known are {', '.join(ALGORITHMS)}")
    return importlib.import_module(ALGORITHMS[key]).quantize_block
