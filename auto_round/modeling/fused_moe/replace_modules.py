"""Replacing fused mixture-of-experts modules by ones made of linear layers.

`BUILTIN_MODULES` names the file that registers a model type's replacements; it is imported only for that type.
A replacement is a function `(module, name, model) -> nn.Module` registered for a class name.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from auto_round.special_model_handler import resolve_model_type
from auto_round.utils.common import LazyImport

Replacement = Callable[[nn.Module, str, nn.Module], nn.Module]

BUILTIN_MODULES: dict[str, LazyImport] = {}
_REPLACEMENTS: dict[str, Replacement] = {}


def register_replacement(class_name: str) -> Callable[[Replacement], Replacement]:
    """Register a function that replaces every module of class `class_name`.

    Raises:
        ValueError: another function is registered for that class already.
    """

    def register(function: Replacement) -> Replacement:
        if _REPLACEMENTS.get(class_name, function) is not function:
            raise ValueError(f"a replacement for {class_name} is registered already: {_REPLACEMENTS[class_name]}")
        _REPLACEMENTS[class_name] = function
        return function

    return register


def apply_replacements(model: nn.Module) -> dict[str, str]:
    """Replace registered module classes in place; returns {module name: original class name}."""
    builtin = BUILTIN_MODULES.get(resolve_model_type(model))
    if builtin is not None:
        builtin.resolve()
    done = {}
    for name, module in list(model.named_modules()):
        replace = _REPLACEMENTS.get(type(module).__name__)
        if replace is not None:
            model.set_submodule(name, replace(module, name, model))
            done[name] = type(module).__name__
    return done
