"""Telling fused experts from other modules, and the layout of their parameters, by structure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from auto_round.modeling.fused_moe.experts import StackedExperts, UnfusedExperts
from auto_round.modeling.fused_moe.layout import Layout
from auto_round.modeling.fused_moe.names import DEFAULT_NAMES, expert_names

# Below this size a parameter per expert is a table of factors or scales, not a matrix worth quantizing.
_SMALLEST_SIDE = 8
# Settings that mention experts but do not count them.
_NO_COUNT = ("per_tok", "top", "size", "dim", "layers", "offset", "interval", "period", "group", "capacity")
_HIDDEN_SIZES = ("hidden_size", "d_model", "n_embd", "hidden_dim", "dim")


def expert_counts(config: Any) -> set[int]:
    """Every number of experts that a configuration (or one nested in it) mentions."""
    counts: set[int] = set()
    settings = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for name, value in settings.items():
        key = str(name).lower()
        if isinstance(value, Mapping) or hasattr(value, "to_dict"):
            counts |= expert_counts(value)
        elif "expert" in key and not any(word in key for word in _NO_COUNT):
            values = value if isinstance(value, (list, tuple)) else (value,)
            counts |= {n for n in values if isinstance(n, int) and not isinstance(n, bool) and n > 1}
    return counts


def _ancestors(model: nn.Module, name: str) -> Iterable[tuple[str, nn.Module]]:
    """The module itself, then each one around it."""
    while True:
        yield name, model.get_submodule(name)
        if not name:
            return
        name = name.rpartition(".")[0]


def _nearest_config(model: nn.Module, name: str) -> Any:
    for _, module in _ancestors(model, name):
        config = getattr(module, "config", None)
        if config is not None:
            return config
    return None


def matrices(module: nn.Module, known: bool = False) -> dict[str, nn.Parameter]:
    """A module's own parameters that hold one matrix for each of several things, `[n, a, b]`.

    Where the module is `known` to hold experts, there may be a single one, and of any size.
    """
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Bilinear)):
        return {}
    stacks = {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None
        and parameter.dim() == 3
        and (known or parameter.shape[0] > 1)
        and (known or min(parameter.shape[1:]) >= _SMALLEST_SIDE)
    }
    # Block-wise scales of a matrix are named after it.
    return {name: p for name, p in stacks.items() if not any(name.startswith(f"{other}_") for other in stacks)}


def _stacked_rows(module: nn.Module, name: str, model: nn.Module) -> list[Layout]:
    """Layouts of experts stacked in two dimensions: gate, up and down, all `[experts * F, hidden]`."""
    own = {key: p for key, p in module._parameters.items() if p is not None}
    shapes = {tuple(parameter.shape) for parameter in own.values()}
    if len(own) != 3 or len(shapes) != 1 or len(shape := shapes.pop()) != 2:
        return []
    config = _nearest_config(model, name)
    if shape[1] != _hidden_size(config):
        return []
    counts = [n for n in expert_counts(config) if shape[0] % n == 0 and shape[0] // n >= _SMALLEST_SIDE]
    if not counts or not any(part.isdigit() for part in name.split(".")):
        return []
    # All three have the hidden size last, so the one that returns to it, declared last, is stored [in, out].
    rows, last = shape[0] // max(counts), list(own)[-1]
    return [Layout(key, (key,), transposed=key == last, rows=rows) for key in own]


def follows_interface(module: nn.Module) -> bool:
    """Whether a module computes what Transformers' experts interface says, in one of its layouts."""
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    decorated = hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    return decorated and list(matrices(module, known=True)) == [up, "down_proj"]


def holds_experts(module: nn.Module, name: str, model: nn.Module) -> bool:
    """Whether the matrices of a module belong to experts.

    The evidence is that the module sits in a list of blocks and one of its parameters has as many matrices as the
    configuration says there are experts; or, weaker, that its class or a module around it is called after experts.
    """
    stacks = matrices(module)
    if not stacks:
        return False
    parts = name.split(".")
    counts = {stack.shape[0] for stack in stacks.values()}
    if any(part.isdigit() for part in parts) and counts & expert_counts(_nearest_config(model, name)):
        return True
    called = [type(module).__name__.lower(), *(part.lower() for part in parts)]
    return any("expert" in word or word == "moe" for word in called)


def is_transposed(module: nn.Module, stacks: Mapping[str, nn.Parameter], hidden_size: int | None) -> bool:
    """Whether matrices are stored `[in, out]`: as the module says, as their shapes fit together, else not."""
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    shapes = [tuple(stack.shape[1:]) for stack in stacks.values()]
    if len(shapes) == 2:
        (a, b), (c, d) = shapes
        if b == c and a == 2 * d:  # [2I, H] and [H, I]
            return False
        if a == d and b == 2 * c:  # [H, 2I] and [I, H]
            return True
    sizes = (("in_features", "out_features"), ("input_size", "output_size"))
    for first, second in sizes:
        pair = (getattr(module, first, None), getattr(module, second, None))
        if isinstance(pair[0], int) and pair[0] != pair[1] and pair in {shapes[0], shapes[0][::-1]}:
            return shapes[0] == pair
    # The projection that reads the hidden states is declared first.
    rows, columns = shapes[0]
    return rows == hidden_size != columns


def _hidden_size(config: Any) -> int | None:
    return next((size for key in _HIDDEN_SIZES if isinstance(size := getattr(config, key, None), int)), None)


def expert_layouts(module: nn.Module, name: str, model: nn.Module, known: bool = False) -> list[Layout]:
    """The layouts of a module's expert parameters, with the names that the checkpoint gives to their layers."""
    stacks = matrices(module, known)
    names = expert_names(model, name)
    transposed = is_transposed(module, stacks, _hidden_size(_nearest_config(model, name)))
    layouts = []
    for parameter in stacks:
        layers = names.get(parameter) or DEFAULT_NAMES.get(parameter, (parameter,))
        if len(stacks) == 1 and layers == ("weight",):
            layers = ("",)
        interleaved = len(layers) > 1 and not getattr(module, "is_concatenated", True)
        layouts.append(Layout(parameter, layers, transposed=transposed, interleaved=interleaved))
    return layouts


def unfuse(module: nn.Module, name: str, model: nn.Module) -> nn.Module | None:
    """The module with its fused experts taken apart, or None where it holds none.

    Args:
        module: the module, on the meta device or in memory.
        name: its name in the model.
        model: the model, for its configuration and the names in its checkpoints.
    """
    if isinstance(module, (UnfusedExperts, StackedExperts)):
        return None
    if follows_interface(module):
        return unfuse_interface(module, name, model)
    if holds_experts(module, name, model):
        return StackedExperts.from_fused(module, expert_layouts(module, name, model))
    rows = _stacked_rows(module, name, model)
    return StackedExperts.from_fused(module, rows) if rows else None


def unfuse_interface(
    module: nn.Module, name: str, model: nn.Module, kind: type[UnfusedExperts] = UnfusedExperts
) -> UnfusedExperts:
    """Take apart a module that computes what Transformers' experts interface says, decorated or not."""
    layouts = []
    for layout in expert_layouts(module, name, model, known=True):
        bias = f"{layout.parameter}_bias"
        has_bias = module._parameters.get(bias) is not None
        layouts.append(replace(layout, bias=bias if has_bias else None))
    return kind.from_fused(module, layouts)
