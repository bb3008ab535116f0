"""The names that a checkpoint gives to single experts' layers, read from Transformers' weight conversions."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

# Layers of parameters that the checkpoint stores fused: nothing but convention names these.
DEFAULT_NAMES: dict[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj")}

_CONVERTERS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def weight_converters(model: nn.Module) -> list[Any]:
    """Transformers' conversions that merge or split tensors of this model's checkpoints; empty where it has none."""
    if model not in _CONVERTERS:
        _CONVERTERS[model] = _find_converters(model)
    return _CONVERTERS[model]


def _find_converters(model: nn.Module) -> list[Any]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return []
    return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter)]


def expert_names(model: nn.Module, path: str) -> dict[str, tuple[str, ...]]:
    """What the checkpoint calls the layers of each fused parameter of a module.

    Args:
        model: the model that the module belongs to.
        path: the fused module's name in the model.

    Returns:
        Parameter name -> layer names, in the order of the parameter's output rows, such as
        `{"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}`. Parameters that the checkpoint stores fused are left
        out.
    """
    found: dict[str, tuple[str, ...]] = {}
    module = model.get_submodule(path)
    for converter in weight_converters(model):
        layers = tuple(_layer_name(source) for source in converter.source_patterns)
        if not all(layers):
            continue
        for parameter in module._parameters:
            if parameter not in found and any(
                _names(target, f"{path}.{parameter}", converter) for target in converter.target_patterns
            ):
                found[parameter] = layers
    return found


def _layer_name(source: str) -> str:
    """`w1` for `.experts.*.w1.weight`, nothing where the pattern does not run over experts."""
    _, star, tail = source.replace("\\", "").rpartition("*.")
    return tail.removesuffix(".weight") if star else ""


def _names(target: str, full_name: str, converter: Any) -> bool:
    """Whether a target pattern names this parameter, within the part of the model that the conversion is for."""
    plain = target.replace("\\", "").removeprefix("^").removesuffix("$")
    if not f".{full_name}".endswith(plain if plain.startswith(".") else f".{plain}"):
        return False
    scope = getattr(converter, "scope_prefix", None)
    if not scope:
        return True
    base = getattr(converter, "base_model_prefix", None)
    return full_name.startswith((f"{scope}.", f"{base}.{scope}."))
