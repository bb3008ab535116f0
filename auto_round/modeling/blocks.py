"""Finding a model's blocks in its module graph: the repeated modules that are quantized one at a time.

A stack is a list of modules that hold quantizable layers, not itself inside another list. Which stacks process text is
told by where the token embedding sits, or, better, by running the model (`calibration/discover.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from auto_round.special_model_handler import model_traits
from auto_round.utils.common import is_supported_layer, walk

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def get_block_names(model: nn.Module, quant_vision: bool = False) -> list[list[str]]:
    """Full names of the model's blocks, one list per stack.

    A handler for the model type is asked first; otherwise every outermost list of modules that hold quantizable layers
    is a stack. Stacks that stand apart from the token embedding (vision and audio towers) count when `quant_vision` is
    set.
    """
    handler = model_traits(model).block_handler
    handled = handler(model, quant_vision) if handler is not None else []
    if handled:
        return handled
    stacks = find_stacks(model)
    return stacks if quant_vision else text_stacks(model, stacks)


def find_stacks(model: nn.Module) -> list[list[str]]:
    """All stacks of a model, of text and other towers, in the order of the module tree."""
    sizes = vocabulary_sizes(getattr(model, "config", None))
    stacks = [names for names in _lists(model, "") if not _is_head(model.get_submodule(names[0]), sizes)]
    found = [names for names in stacks if any(_has_layers(model.get_submodule(name)) for name in names)]
    return found or [names for names in stacks if any(_has_matrices(model.get_submodule(name)) for name in names)]


def _lists(module: nn.Module, prefix: str) -> Iterator[list[str]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, _CONTAINERS) or _repeats(child):
            yield from _members(child, path)
        else:
            yield from _lists(child, path + ".")


def _repeats(module: nn.Module) -> bool:
    """Whether a sequence is made of alike modules that are blocks rather than single layers."""
    if not isinstance(module, nn.Sequential) or len(module) < 2 or len({type(m) for m in module}) > 1:
        return False
    return all(sum(map(is_supported_layer, member.modules())) > 1 for member in module)


def _members(container: nn.Module, path: str) -> Iterator[list[str]]:
    """The container's members as a stack; members that are never called themselves, as lists of lists, give theirs."""
    own = []
    for name, member in container.named_children():
        if _is_called(member):
            own.append(f"{path}.{name}")
        elif isinstance(member, _CONTAINERS):
            yield from _members(member, f"{path}.{name}")
        else:
            yield from _lists(member, f"{path}.{name}.")
    if own:
        yield own


def _is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward and not isinstance(module, _CONTAINERS)


def _has_layers(module: nn.Module) -> bool:
    return any(is_supported_layer(child) for _, child in walk(module))


def _is_head(module: nn.Module, sizes: set[int]) -> bool:
    """Whether a member of a list is an output layer; models of several code books have one for each."""
    return is_supported_layer(module) and module.weight.shape[0] in sizes


def _has_matrices(module: nn.Module) -> bool:
    """Whether something in it could be a layer of a type that is not known."""
    return any(parameter.dim() == 2 for parameter in module.parameters())


def text_stacks(model: nn.Module, stacks: list[list[str]]) -> list[list[str]]:
    """Stacks that stand nearest to a token embedding."""
    owners = {index: _owner(model, stack[0]) for index, stack in enumerate(stacks)}
    found = [
        stack
        for index, stack in enumerate(stacks)
        if owners[index] is not None
        and not any(_is_inside(other, owners[index]) for other in owners.values() if other is not None)
    ]
    return found or stacks


def _is_inside(inner: str, outer: str) -> bool:
    return inner != outer and (not outer or inner.startswith(f"{outer}."))


def _owner(model: nn.Module, block: str) -> str | None:
    """The nearest module around a block that holds a token embedding."""
    path = block
    sizes = vocabulary_sizes(getattr(model, "config", None))
    while path:
        path = path.rpartition(".")[0]
        for module in model.get_submodule(path).modules():
            if isinstance(module, nn.Embedding) and (not sizes or module.num_embeddings in sizes):
                return path
    return None


def vocabulary_sizes(config: Any) -> set[int]:
    """Sizes of all vocabularies that a configuration and those nested in it name."""
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return set(_sizes(values))


def _sizes(values: Mapping[str, Any]) -> Iterator[int]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _sizes(value)
        elif str(key).endswith("vocab_size") and isinstance(value, int):
            yield value
