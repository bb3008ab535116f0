"""Number families. One file each, named in `DATA_TYPES` by the `data_type` of a scheme."""

from __future__ import annotations

import importlib
from types import ModuleType

DATA_TYPES: dict[str, str] = {
    "int": "auto_round.data_type.int",
    "mx_int": "auto_round.data_type.mxfp",
    "mx_fp": "auto_round.data_type.mxfp",
    "mx_fp_rceil": "auto_round.data_type.mxfp",
    "nv_fp": "auto_round.data_type.nvfp",
    "nv_fp4_with_static_gs": "auto_round.data_type.nvfp",
    "fp": "auto_round.data_type.fp8",
    "int_asym_float_zp": "auto_round.data_type.gguf",
    "int_sym_dq": "auto_round.data_type.gguf",
    "int_asym_dq": "auto_round.data_type.gguf",
}


def data_type(name: str) -> ModuleType:
    """The module of a number family (`base.NumberFamily`).

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in DATA_TYPES:
        raise ValueError(f"unknown data_type {name!r}: known are {', '.join(DATA_TYPES)}")
    return importlib.import_module(DATA_TYPES[name])
