"""How the tensors of a checkpoint become the parameters of a model, and under which names they are written back.

The translation is Transformers' own (the renamings and converters of its loader), so every checkpoint that Transformers
loads streams the same way. Most tensors are parameters, renamed at most. Others are merged or split by a converter, or
belong to fused experts that were taken apart: those form groups, whose parameters are written under the model's names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from auto_round.modeling.checkpoint import Checkpoint, CheckpointError
from auto_round.utils.common import walk


@dataclass(frozen=True)
class Group:
    """Source tensors that together become several parameters, or one.

    written: parameter → the name under which it is stored when it is not left as it was.
    fused: Transformers' own parameters (fused experts) that they were cut out of, if they were.
    """

    sources: tuple[str, ...]
    written: Mapping[str, str]
    fused: tuple[str, ...] = ()


@dataclass
class NameMap:
    """The way from checkpoint to model.

    direct: parameter name → checkpoint name, where the tensor is the parameter, unchanged.
    groups: those that are not; by the name of their first parameter in the original model.
    unused: checkpoint names that the model does not instantiate.
    computed: parameters that checkpoints leave out, since the model's class computes them.
    """

    direct: dict[str, str] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()

    def written(self, parameter: str) -> str:
        """The name under which a parameter is stored."""
        if parameter in self.direct:
            return self.direct[parameter]
        group = self.group_of(parameter)
        return parameter if group is None else group.written[parameter]

    def group_of(self, parameter: str) -> Group | None:
        return next((group for group in self.groups.values() if parameter in group.written), None)


class Renamer:
    """Transformers' name translation for one model.

    Attributes:
        transforms: everything that its loader applies, in order.
    """

    def __init__(self, model: nn.Module):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.transforms = get_model_conversion_mapping(model) if hasattr(model, "config") else []
        self.renamings = [t for t in self.transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in self.transforms if isinstance(t, WeightConverter)]
        self.prefix = getattr(model, "base_model_prefix", "") or ""

    def translate(self, key: str, expected: Mapping[str, Any], convert: bool = True) -> tuple[str | None, Any]:
        """(parameter, converter or None) of a checkpoint name; (None, None) if the model has no such parameter."""
        from transformers.core_model_loading import rename_source_key

        tries = [(self.renamings, self.converters if convert else []), ([], [])]
        for renamings, converters in tries:
            name, pattern = rename_source_key(key, renamings, converters, self.prefix, expected)
            if name in expected:
                return name, next((c for c in converters if pattern in c.source_patterns), None) if pattern else None
        return None, None


def own_names(model: nn.Module) -> NameMap:
    """Names of a model in memory: each parameter and stored buffer as Transformers would call it when saving.

    Where the way back from there is not certain, a parameter keeps its own name.
    """
    renamer, expected = Renamer(model), model.state_dict()
    reverse = _reverse_renamings(model)
    if not reverse:
        return NameMap({name: name for name in expected})
    names = {name: _rename(name, reverse) for name in expected}
    counts = Counter(names.values())
    certain = {
        name
        for name, found in names.items()
        if counts[found] == 1 and renamer.translate(found, expected, convert=False)[0] == name
    }
    return NameMap({name: found if name in certain else name for name, found in names.items()})


def _reverse_renamings(model: nn.Module) -> list[Any]:
    """Transformers' renamings from the model to its checkpoint, as its own saving applies them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    if not hasattr(model, "config"):
        return []
    rules = getattr(model, "_weight_conversions", None)
    if rules is None:
        rules = get_model_conversion_mapping(model, add_legacy=False)
        rules = [rule for rule in rules if not isinstance(rule, PrefixChange)]
    return [rule.reverse_transform() for rule in reversed(rules) if isinstance(rule, WeightRenaming)]


def _rename(name: str, rules: list[Any]) -> str:
    for rule in rules:
        name = rule.rename_source_key(name)[0]
    return name


def expand(first: str, converter: Any, expected: Mapping[str, Any]) -> list[str]:
    """All parameters that a converter makes, from the name of the first."""
    targets = [target.replace("\\", "") for target in converter.target_patterns]
    names = [first.replace(targets[0], target, 1) for target in targets]
    return [name for name in dict.fromkeys(names) if name in expected] or [first]


def map_names(model: nn.Module, checkpoint: Checkpoint, renamer: Renamer) -> NameMap:
    """Names of a model whose modules are Transformers' own.

    Raises:
        CheckpointError: parameters of the model that the checkpoint has no tensor for.
    """
    expected = model.state_dict()
    result, unused = NameMap(), []
    sources: dict[str, list[str]] = {}
    converters: dict[str, Any] = {}
    for key in checkpoint.names():
        name, converter = renamer.translate(key, expected)
        if name is None:
            unused.append(key)
        elif converter is None:
            result.direct[name] = key
        else:
            sources.setdefault(name, []).append(key)
            converters[name] = converter
    for name, keys in sources.items():
        made = expand(name, converters[name], expected)
        result.groups[name] = Group(tuple(keys), {parameter: parameter for parameter in made})
    result.unused = tuple(unused)
    absent = _absent(model, result)
    left_out = [*(getattr(model, "_keys_to_ignore_on_save", None) or ()), *_left_out(model)]
    result.computed = tuple(name for name in absent if any(re.search(pattern, name) for pattern in left_out))
    _check_complete(model, [name for name in absent if name not in result.computed], checkpoint)
    return result


def _left_out(model: nn.Module) -> list[str]:
    """Patterns of what the parts of a model leave out of checkpoints, under the whole model's names."""
    patterns = []
    for name, module in walk(model):
        for pattern in getattr(module, "_keys_to_ignore_on_save", None) or ():
            patterns.append(f"^{re.escape(name)}\\..*{pattern}" if name else pattern)
    return patterns


def _absent(model: nn.Module, names: NameMap) -> list[str]:
    """Parameters that no checkpoint tensor becomes."""
    made = {*names.direct, *(parameter for group in names.groups.values() for parameter in group.written)}
    tied = getattr(model, "all_tied_weights_keys", {}) or {}
    known = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in made}
    return [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in made and name not in tied and id(parameter) not in known
    ]


def _check_complete(model: nn.Module, absent: list[str], checkpoint: Checkpoint) -> None:
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or []
    absent = [name for name in absent if not any(re.search(pattern, name) for pattern in ignored)]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.directory} has no tensor for {absent[0]!r}{more} of {type(model).__name__}: "
            "the checkpoint is incomplete, or config.json describes another model"
        )


def adapt_names(names: NameMap, replaced: Mapping[str, Any], renamer: Renamer) -> tuple[NameMap, set[str]]:
    """Names after fused modules were replaced; and the replaced modules whose tensors must be cut out of fused ones.

    A checkpoint that holds experts one by one gives its tensors to the layers directly. One that holds them fused is
    split into names that follow the fused tensor's.
    """
    if not replaced:
        return names, set()
    result = NameMap(dict(names.direct), dict(names.groups), names.unused)
    split: set[str] = set()
    parts = _parts_by_source(replaced)
    expected = {part: True for made in parts.values() for part in made}
    taken: dict[tuple[str, ...], list[str]] = {}  # sources → fused parameters that they become
    for fused in parts:
        taken.setdefault(_take_sources(names, result, fused), []).append(fused)
    taken.pop((), None)  # tied to others, and stored under their names
    for sources, several in taken.items():
        made = [part for fused in several for part in parts[fused]]
        direct = {renamer.translate(key, expected, convert=False)[0]: key for key in sources}
        if set(direct) == set(made):
            result.direct.update(direct)
            continue
        written = {}
        for fused in several:
            module = next(name for name in replaced if fused.startswith(f"{name}."))
            split.add(module)
            stem = _stem(sources, fused, module)
            written |= {part: f"{stem}{part[len(module) + 1 :]}" for part in parts[fused]}
        result.groups[several[0]] = Group(sources, written, tuple(several))
    return result, split


def _parts_by_source(replaced: Mapping[str, Any]) -> dict[str, list[str]]:
    """Fused parameter → parameters taken from it, under full names; a module of several names goes by its first."""
    parts: dict[str, list[str]] = {}
    seen: set[int] = set()
    for module, pair in replaced.items():
        if id(pair.new) in seen:
            continue
        seen.add(id(pair.new))
        for own, part in pair.origin.items():
            parts.setdefault(f"{module}.{part.parameter}", []).append(f"{module}.{own}")
    return parts


def _take_sources(names: NameMap, result: NameMap, fused: str) -> tuple[str, ...]:
    """The checkpoint names of a fused parameter, which `result` no longer gives to it."""
    if fused in names.direct:
        result.direct.pop(fused, None)
        return (names.direct[fused],)
    for first, group in names.groups.items():
        if fused in group.written:
            result.groups.pop(first, None)
            return group.sources
    return ()


def _stem(sources: tuple[str, ...], fused: str, module: str) -> str:
    """What stands before an expert's number: as in the checkpoint where that stores the fused parameter itself."""
    parameter = fused[len(module) + 1 :]
    if len(sources) == 1 and sources[0].endswith(parameter):
        return sources[0][: -len(parameter)]
    return f"{module}."
