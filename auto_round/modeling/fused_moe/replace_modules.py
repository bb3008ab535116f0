"""Replacing fused mixture-of-experts modules by ones made of linear layers.

Structure decides (see `structure.py`). Where it cannot, a replacement, a function `(module, name, model) -> nn.Module`,
is registered for a class name; `BUILTIN_MODULES` names the file that does so for a model type, imported only for it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from auto_round.modeling.fused_moe.layout import Slice, clone_shell, read_tensor
from auto_round.modeling.fused_moe.structure import unfuse
from auto_round.utils.common import LazyImport

Replacement = Callable[[nn.Module, str, nn.Module], nn.Module]

_PACKAGE = "auto_round.modeling.fused_moe"
BUILTIN_MODULES: dict[str, LazyImport] = {
    "dbrx": LazyImport(f"{_PACKAGE}.dbrx"),
    "deepseek_v2": LazyImport(f"{_PACKAGE}.deepseek_v2"),
    "llama4": LazyImport(f"{_PACKAGE}.llama4"),
    "llama4_text": LazyImport(f"{_PACKAGE}.llama4"),
    "longcat_flash": LazyImport(f"{_PACKAGE}.longcat_flash"),
    "qwen3_5_moe": LazyImport(f"{_PACKAGE}.qwen3_5_moe"),
    "qwen3_5_moe_text": LazyImport(f"{_PACKAGE}.qwen3_5_moe"),
    "qwen3_omni_moe": LazyImport(f"{_PACKAGE}.qwen3_omni_moe"),
    "step3p5": LazyImport(f"{_PACKAGE}.step3p5"),
    "zamba": LazyImport(f"{_PACKAGE}.zamba"),
    "step3p7": LazyImport(f"{_PACKAGE}.step3p5"),
}
_REPLACEMENTS: dict[str, Replacement] = {}


@dataclass(frozen=True)
class Replaced:
    """A module that was replaced: the fused one, and the one that stands in the model now."""

    original: nn.Module
    new: nn.Module

    @property
    def origin(self) -> dict[str, Slice]:
        """Own parameter name of the new module -> where it is found in the original."""
        return getattr(self.new, "origin", {})


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


def _model_types(config: Any) -> Iterator[str]:
    """The model type of a configuration and of those nested in it."""
    if isinstance(getattr(config, "model_type", None), str):
        yield config.model_type
    for value in getattr(config, "__dict__", {}).values():
        if hasattr(value, "to_dict"):
            yield from _model_types(value)


def apply_replacements(model: nn.Module) -> dict[str, Replaced]:
    """Replace fused experts in place, on the meta device (nothing is allocated) or in memory (weights are copied).

    Registered classes first, then whatever structure shows to be fused experts. Applying it again changes nothing.

    Returns:
        Module name -> what was there and what is there now. A module that the model holds under several names is
        replaced by one, under each of them.
    """
    for model_type in _model_types(getattr(model, "config", None)):
        if model_type in BUILTIN_MODULES:
            BUILTIN_MODULES[model_type].resolve()

    def registered(module: nn.Module, name: str) -> nn.Module | None:
        function = _REPLACEMENTS.get(type(module).__name__)
        return None if function is None or hasattr(module, "origin") else function(module, name, model)

    done = _replace_where(model, registered)
    done |= _replace_where(model, lambda module, name: unfuse(module, name, model))
    _tie(model, done)
    return done


def _replace_where(model: nn.Module, replacement: Callable[[nn.Module, str], nn.Module | None]) -> dict[str, Replaced]:
    done: dict[str, Replaced] = {}
    seen: dict[int, Replaced | None] = {}
    # Modules held under several names are listed under each; ids are safe while `named` keeps the modules alive.
    named = list(model.named_modules(remove_duplicate=False))
    for name, module in named:
        if not name or any(name.startswith(f"{outer}.") for outer in done):
            continue
        if id(module) not in seen:
            new = replacement(module, name)
            seen[id(module)] = None if new is None or new is module else Replaced(module, new)
        replaced = seen[id(module)]
        if replaced is not None:
            model.set_submodule(name, replaced.new)
            done[name] = replaced
    return done


def _tie(model: nn.Module, done: dict[str, Replaced]) -> None:
    """Layers made of one fused parameter that several modules share are shared as well.

    Transformers ties weights by name again after loading, so the model's list of tied names follows.
    """
    first: dict[tuple[int, Slice], tuple[str, nn.Parameter]] = {}
    tied: dict[str, str] = {}
    fused = {path: _fused_tensors(replaced) for path, replaced in done.items()}
    holders = Counter(identity for found in fused.values() for identity in found.values())
    for path, replaced in done.items():
        if all(holders[identity] == 1 for identity in fused[path].values()):
            continue  # most models: to look at each of a thousand experts again would tell nothing
        for name, part in replaced.origin.items():
            key = fused[path][part.parameter], part._replace(parameter="")
            full_name, shared = first.setdefault(key, (f"{path}.{name}", read_tensor(replaced.new, name)))
            if full_name != f"{path}.{name}":
                owner, _, leaf = name.rpartition(".")
                setattr(replaced.new.get_submodule(owner), leaf, shared)
                tied[f"{path}.{name}"] = full_name
    names = getattr(model, "all_tied_weights_keys", None)
    if names and done:
        gone = {f"{path}.{parameter}" for path, found in fused.items() for parameter in found}
        kept = {key: value for key, value in names.items() if key not in gone and value not in gone}
        model.all_tied_weights_keys = kept | tied
    if tied:
        _drop_dead_patterns(model)


def _fused_tensors(replaced: Replaced) -> dict[str, int]:
    """Fused parameters that layers were cut out of, by name, and which tensor each is."""
    parameters = {part.parameter for part in replaced.origin.values()}
    return {parameter: id(read_tensor(replaced.original, parameter)) for parameter in sorted(parameters)}


def _drop_dead_patterns(model: nn.Module) -> None:
    """Take from Transformers' tying rules those for fused parameters: it raises where a rule matches nothing."""
    for module in model.modules():
        rules = getattr(module, "_tied_weights_keys", None)
        if not isinstance(rules, dict):
            continue
        names = [name for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())]
        alive = {key: value for key, value in rules.items() if any(re.match(key, name) for name in names)}
        if len(alive) < len(rules):
            module._tied_weights_keys = alive


def with_children(module: nn.Module, name: str, model: nn.Module) -> nn.Module:
    """A clone of a module whose fused experts, among its own children, are taken apart by structure.

    For registered replacements of whole blocks: what the block does around its experts stays as it is.
    """
    new = clone_shell(module)
    new.origin = {}
    for child_name, child in module.named_children():
        unfused = unfuse(child, f"{name}.{child_name}", model)
        if unfused is None:
            continue
        new._modules[child_name] = unfused
        for key, part in unfused.origin.items():
            new.origin[f"{child_name}.{key}"] = part.inside(child_name)
    return new


def scatter(original: nn.Module, new: nn.Module) -> None:
    """Fill the new module's layers from the fused parameters, one by one."""
    for name, part in getattr(new, "origin", {}).items():
        owner, _, leaf = name.rpartition(".")
        layer = new.get_submodule(owner)
        value = part.take(read_tensor(original, part.parameter))
        setattr(layer, leaf, nn.Parameter(value, layer._parameters[leaf].requires_grad))


def gather(original: nn.Module, new: nn.Module) -> None:
    """Fill the fused parameters from the new module's layers, one by one; what both have is shared again.

    Parameters of the original that are on the meta device are allocated where the layers' weights are.
    """
    origin = getattr(new, "origin", {})
    fused: dict[str, torch.Tensor] = {}
    for name, part in origin.items():
        value = read_tensor(new, name)
        if part.parameter not in fused:
            fused[part.parameter] = _allocated(original, part.parameter, value)
        part.put(fused[part.parameter], value)
    for name, kept in (*new.named_parameters(), *new.named_buffers()):
        if name in origin:
            continue
        owner, _, leaf = name.rpartition(".")
        try:
            tables = original.get_submodule(owner)
        except AttributeError:
            continue  # of a layer that the original does not have, such as the scales of a packed one
        for table in (tables._parameters, tables._buffers):
            if leaf in table:
                table[leaf] = kept


def _allocated(module: nn.Module, name: str, like: torch.Tensor) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    table = module.get_submodule(owner)._parameters
    if table[leaf].device.type == "meta" and like.device.type != "meta":
        empty = torch.empty(table[leaf].shape, dtype=like.dtype, device=like.device)
        table[leaf] = nn.Parameter(empty, table[leaf].requires_grad and empty.is_floating_point())
    return table[leaf]


def release(original: nn.Module, new: nn.Module) -> None:
    """Give back the memory of the fused parameters; `gather` fills them again."""
    for name in {part.parameter for part in getattr(new, "origin", {}).values()}:
        owner, _, leaf = name.rpartition(".")
        table = original.get_submodule(owner)._parameters
        table[leaf] = nn.Parameter(table[leaf].detach().to("meta"), table[leaf].requires_grad)
