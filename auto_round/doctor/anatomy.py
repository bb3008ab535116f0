"""Looking at a module tree for what the quantizer does not see: unusual places of blocks, layers and weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from auto_round.modeling.blocks import find_stacks
from auto_round.modeling.fused_moe.structure import expert_counts, is_transposed
from auto_round.utils.common import is_supported_layer
from auto_round.utils.model import block_matrices

_LISTS = (nn.ModuleList, nn.ModuleDict)
_SMALLEST = 32


def own_matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters of two or three dimensions that are large enough to be quantized."""
    if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: p for name, p in own if p.dim() in (2, 3) and min(p.shape[-2:]) >= _SMALLEST}


def is_linear_like(module: nn.Module) -> bool:
    """Whether a module looks like a linear layer of a type that is not supported: one matrix, called `weight`."""
    own = own_matrices(module)
    return list(own) == ["weight"] and own["weight"].dim() == 2 and not is_supported_layer(module)


def unknown_layers(model: nn.Module, blocks: Iterable[str]) -> dict[str, nn.Module]:
    """Modules in the blocks that look like linear layers of an unsupported type."""
    return {
        name: module
        for block in blocks
        for name, module in model.get_submodule(block).named_modules(prefix=block)
        if is_linear_like(module)
    }


def listed_stacks(model: nn.Module) -> list[list[str]]:
    """Lists of modules that hold matrices, whatever the types of their layers; outermost ones only."""
    stacks: list[list[str]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for stack in stacks for block in stack)
        if isinstance(module, _LISTS) and not inside:
            members = [f"{name}.{key}" for key, child in module.named_children() if _holds_matrices(child)]
            stacks += [members] if members else []
    return stacks


def _holds_matrices(module: nn.Module) -> bool:
    return any(own_matrices(child) for child in module.modules())


def alike_siblings(model: nn.Module, inside: Sequence[str] = ()) -> list[list[str]]:
    """Modules of one class that stand side by side as plain attributes and hold several matrices: blocks, probably."""
    groups: list[list[str]] = []

    def walk(module: nn.Module, path: str) -> None:
        kinds: dict[type, list[str]] = {}
        for name, child in module.named_children():
            if f"{path}{name}" not in inside and sum(len(own_matrices(m)) for m in child.modules()) > 1:
                kinds.setdefault(type(child), []).append(f"{path}{name}")
        found = [names for kind, names in kinds.items() if len(names) > 1 and not issubclass(kind, _LISTS)]
        groups.extend(found)
        taken = {name for names in found for name in names}
        for name, child in module.named_children():
            if f"{path}{name}" not in taken and not isinstance(child, _LISTS):
                walk(child, f"{path}{name}.")

    walk(model, "")
    return groups


def unregistered(model: nn.Module) -> list[str]:
    """Attributes that hold modules in a plain list, tuple or dictionary: they are neither saved nor loaded."""
    known = {id(module) for module in model.modules()}
    found = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            items = value.values() if isinstance(value, dict) else value
            if key.startswith("_") or not isinstance(value, (list, tuple, dict)):
                continue
            if any(isinstance(item, nn.Module) and id(item) not in known for item in items):
                found.append(f"{name}.{key}".lstrip("."))
    return found


def weight_in(model: nn.Module, names: Iterable[str]) -> int:
    """Elements of the matrices in these modules."""
    return sum(parameter.numel() for _, parameter in block_matrices(model, list(names)))


def other_stacks(model: nn.Module, stacks: Sequence[Sequence[str]]) -> list[list[str]]:
    """Stacks of the module tree that are not among these: towers, or what text does not reach."""
    taken = {name for stack in stacks for name in stack}
    return [stack for stack in find_stacks(model) if not taken & set(stack)]


def stack_names(stacks: Iterable[Sequence[str]]) -> list[str]:
    """`model.layers.0 … 3` for each stack."""
    words = []
    for stack in stacks:
        head, _, first = stack[0].rpartition(".")
        last = stack[-1].rpartition(".")[2]
        alone = len(stack) == 1 or not head or any(name.rpartition(".")[0] != head for name in stack)
        words.append(", ".join(stack) if alone else f"{head}.{first} … {last}")
    return words


# ---- weights that no layer covers ---------------------------------------------------------------------------------


def fused_facts(model: nn.Module, names: Iterable[str]) -> list[dict[str, Any]]:
    """What an unfuser needs to know of the modules that these parameters belong to, each class once.

    For each parameter its shape and a guess: how many experts it holds, rows of one expert where they are stacked in
    two dimensions, and whether it is stored input dimension first.
    """
    owned: dict[str, list[str]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        owned.setdefault(path, []).append(leaf)
    facts: dict[str, dict[str, Any]] = {}
    for path, leaves in owned.items():
        module = model.get_submodule(path)
        kind = type(module)
        if kind.__name__ not in facts:
            entry = {"class": kind.__name__, "module": path, "python": kind.__module__, "forward": signature(module)}
            facts[kind.__name__] = {**entry, "parameters": _guesses(model, path, leaves)}
    return list(facts.values())


def _guesses(model: nn.Module, path: str, leaves: Sequence[str]) -> dict[str, dict[str, Any]]:
    module = model.get_submodule(path)
    config = next((c for m in _around(model, path) if (c := getattr(m, "config", None)) is not None), None)
    stacks: dict[str, torch.Tensor] = {}
    guesses: dict[str, dict[str, Any]] = {}
    for leaf in leaves:
        parameter = getattr(module, leaf)
        experts, rows = parameter.shape[0], None
        if parameter.dim() == 2:
            fits = [n for n in expert_counts(config) if experts % n == 0 and experts // n >= _SMALLEST]
            rows = experts // max(fits, default=1)
            experts = max(fits, default=None)
        stacks[leaf] = parameter.detach().view(experts or 1, -1, parameter.shape[-1])
        guesses[leaf] = {"shape": list(parameter.shape), "experts": experts, "rows": rows}
    turned = is_transposed(module, stacks, getattr(config, "hidden_size", None))
    alike = len(stacks) == 3 and len({stack.shape for stack in stacks.values()}) == 1
    for number, leaf in enumerate(leaves):  # of three alike, the last one leads back to the hidden size
        guesses[leaf]["transposed"] = turned != (alike and number == 2)
    return guesses


def _around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    while path:
        yield model.get_submodule(path)
        path = path.rpartition(".")[0]
    yield model


def signature(module: nn.Module) -> str:
    """`(hidden_states, top_k_index, top_k_weights)`: names of a forward's parameters."""
    return f"({', '.join(str(p).split(':')[0].split('=')[0].strip() for p in parameters(module))})"


def forward_parameters(module: nn.Module) -> list[str]:
    """Names of what a forward must or may be given, as far as nothing (or None) stands for it by default."""
    plain = [p for p in parameters(module) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [p.name for p in plain if p.default is None or p.default is p.empty]


def parameters(module: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(module.forward).parameters.values())


# ---- state between calls ------------------------------------------------------------------------------------------


def state_of(module: nn.Module, name: str) -> dict[str, Any]:
    """What a block could remember: its buffers and other attributes, by full name; tensors are copied."""
    found: dict[str, Any] = {}
    for path, child in module.named_modules(prefix=name):
        plain = {key: value for key, value in vars(child).items() if not key.startswith("_")}
        for key, value in {**plain, **child._buffers}.items():
            if isinstance(value, torch.Tensor):
                found[f"{path}.{key}"] = value.detach().clone()
            elif isinstance(value, (bool, int, float, str, type(None))):
                found[f"{path}.{key}"] = value
            elif isinstance(value, (list, dict, set)):
                found[f"{path}.{key}"] = len(value)
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names under which something else is held than before."""
    return [name for name in (*before, *(after.keys() - before.keys())) if not _same(before, after, name)]


def _same(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> bool:
    if name not in before or name not in after:
        return False
    one, other = before[name], after[name]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    return type(one) is type(other) and not isinstance(one, torch.Tensor) and one == other
