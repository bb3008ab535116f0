"""Number families. One file each, named in `DATA_TYPES` by the `data_type` of a scheme."""

from __future__ import annotations

import importlib
from types import ModuleType

DATA_TYPES: dict[str, str] = {"int": "auto_round.data_type.int"}


def data_type(name: str) -> ModuleType:
    """The module of a number family: `start_point`, `finish` and its tunable weight.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in DATA_TYPES:
        raise ValueError(f"unknown data_type {name!r}: known are {', '.join(DATA_TYPES)}")
    return importlib.import_module(DATA_TYPES[name])
