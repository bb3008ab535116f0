"""Helpers that people import by name. Names are looked up when used, so importing this package loads nothing."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "LazyImport": "common",
    "SUPPORTED_LAYER_TYPES": "common",
    "INNER_SUPPORTED_LAYER_TYPES": "common",
    "SUPPORTED_DTYPES": "common",
    "SHARED_CACHE_KEYS": "common",
    "is_supported_layer": "common",
    "get_block_names": "model",
    "get_lm_head_name": "model",
    "is_mllm_model": "model",
    "model_infer": "model",
    "check_to_quantized": "model",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
