"""What a choice of schemes takes, in bits per weight or in bytes of a file, and which layers must choose together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from auto_round.auto_scheme import AutoScheme
from auto_round.formats.base import ExportFormat
from auto_round.formats.engines import EngineProfile, fused_groups, merged_groups
from auto_round.plan import LayerPlan, match_layers

KEPT_BITS = 16
SCALE_BITS = {"mx_fp": 8, "mx_int": 8, "nv_fp": 8, "fp": 32}
"""Of families whose scales are no float16."""
_SUPER = {"int_asym_dq": (2, 32), "int_sym_dq": (1, 16)}
"""llama.cpp's: codes of scales for each group, and bits of each super-block."""


def bits_of(layer: LayerPlan, codes_only: bool = False) -> int:
    """Bits of a layer's weight: its codes, and its scales and zero points unless only codes count."""
    scheme, numel = layer.scheme, layer.info.numel
    if not scheme.is_quantized:
        return numel * KEPT_BITS
    codes = numel * scheme.bits
    if codes_only:
        return codes
    groups = _groups(layer)
    if scheme.data_type in _SUPER:
        parts, shared = _SUPER[scheme.data_type]
        return codes + groups * parts * scheme.super_bits + groups // scheme.super_group_size * shared
    if scheme.data_type == "int_asym_float_zp":
        return codes + groups * 32
    if scheme.data_type == "int":
        return codes + groups * (16 + scheme.bits)  # zero points are stored for symmetric codes, too
    return codes + groups * SCALE_BITS.get(scheme.data_type, 16)


def _groups(layer: LayerPlan) -> int:
    size, info = layer.scheme.group_size, layer.info
    if isinstance(size, tuple):
        return -(-info.out_features // size[0]) * -(-info.in_features // size[1])
    return {-1: info.out_features, 0: 1}.get(size, info.numel // max(size, 1))


def bytes_of(layer: LayerPlan, fmt: ExportFormat) -> int:
    """Bytes of a layer's weight as a format stores it."""
    if not layer.is_quantized or fmt.plain:
        return layer.info.numel * layer.info.dtype.itemsize
    return sum(torch.Size(part.shape).numel() * part.dtype.itemsize for part in fmt.layout(layer).values())


def shared_groups(names: Sequence[str], auto: AutoScheme, target: EngineProfile | None) -> list[list[str]]:
    """The layers as groups that get one scheme each, in the order of their first layers.

    What vLLM and SGLang run as one is kept together unless another engine is the target; a module's experts always are.

    Args:
        names: of all layers that are chosen for.

    Raises:
        PlanError: a name or pattern of `shared_layers` matches no layer.
    """
    together = [*(target.groups(names) if target is not None else fused_groups(names))]
    merged = {tuple(group) for group in merged_groups(names)}
    together += [group for group in fused_groups(names) if tuple(group) not in merged]
    for patterns in auto.shared_layers or ():
        matched = dict.fromkeys(name for pattern in patterns for name in match_layers(pattern, names))
        blocks: dict[str, list[str]] = {}
        for name in matched:
            blocks.setdefault(_place(name), []).append(name)
        together += blocks.values()
    return _joined(names, together)


def _place(name: str) -> str:
    """What a layer's name says up to its first number: two layers of one block have it in common."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def _joined(names: Iterable[str], groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Groups that overlap as one, and a group for every other name."""
    home: dict[str, list[str]] = {name: [name] for name in names}
    for group in groups:
        first = home[group[0]]
        for name in group[1:]:
            if (other := home[name]) is not first:
                first += other
                home.update(dict.fromkeys(other, first))
    place = {name: index for index, name in enumerate(home)}
    unique = {id(group): group for group in home.values()}
    return [sorted(group, key=place.__getitem__) for group in unique.values()]


def reachable(averages: Mapping[str, float]) -> str:
    """`W2A16 2.14, W4A16 4.16`."""
    return ", ".join(f"{name} {value:.2f}" for name, value in averages.items())
