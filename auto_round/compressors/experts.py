"""Experts and the tokens that reach them: who was seen too rarely to be tuned, and what stands in for its inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from auto_round.compressors.chain import LayerInputs
from auto_round.data_type import data_type
from auto_round.plan import LayerPlan

FLOOR = 64
"""Tokens below which what an expert was given says more about chance than about the expert."""

Seen = Mapping[str, LayerInputs]

_EXPERT = re.compile(r"^(.*)\.(?:\w*_)?(\d+)((?:\.[^.]+)?)$")


def expert_groups(layers: Mapping[str, LayerPlan]) -> dict[tuple[str, str], list[str]]:
    """Layers of the same role in the experts of one module: (module, layer) → names, for two experts or more."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in layers:
        match = _EXPERT.match(name)
        if match:
            groups.setdefault((match[1], match[3]), []).append(name)
    return {key: names for key, names in groups.items() if len(names) > 1}


def expert_tokens(layers: Mapping[str, LayerPlan], seen: Seen) -> dict[str, Any] | None:
    """How many calibration tokens reached the experts of a block: least, median and most, and those below the floor."""
    counts: dict[tuple[str, str], int] = {}
    for (module, _), names in expert_groups(layers).items():
        for name in names:
            index = _EXPERT.match(name)[2]
            counts[module, index] = max(counts.get((module, index), 0), seen[name].tokens if name in seen else 0)
    if not counts:
        return None
    ordered = sorted(counts.values())
    return {
        "experts": len(ordered),
        "least": ordered[0],
        "median": ordered[len(ordered) // 2],
        "most": ordered[-1],
        "below_floor": sum(count < FLOOR for count in ordered),
        "floor": FLOOR,
    }


def expert_coverage(log: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How calibration tokens reach the experts of all blocks, from the log of a run; None for a model without experts.

    Returns:
        experts: number of them. least: tokens of the one that gets the fewest. median: of the blocks' medians.
        below_floor: share of the experts that get fewer tokens than `floor`.
    """
    seen = [block["experts"] for block in log if block.get("experts")]
    if not seen:
        return None
    total = sum(one["experts"] for one in seen)
    return {
        "experts": total,
        "least": min(one["least"] for one in seen),
        "median": sorted(one["median"] for one in seen)[len(seen) // 2],
        "below_floor": round(sum(one["below_floor"] for one in seen) / total, 4),
        "floor": FLOOR,
    }


def rarely_used(layers: Mapping[str, LayerPlan], seen: Seen) -> list[str]:
    """Layers of experts that too few tokens reached to tune their rounding."""
    return [
        name
        for names in expert_groups(layers).values()
        if any(name in seen for name in names)
        for name in names
        if name not in seen or seen[name].tokens < FLOOR
    ]


def shared_importance(layers: Mapping[str, LayerPlan], seen: Seen) -> dict[str, torch.Tensor]:
    """Mean square of each input channel of each layer [in]; rarely used experts get that of all experts' tokens."""
    importance = {name: inputs.mean_square for name, inputs in seen.items()}
    rare = set(rarely_used(layers, seen))
    for names in expert_groups(layers).values():
        tokens = sum(seen[name].tokens for name in names if name in seen)
        if not tokens or not rare.intersection(names):
            continue
        together = sum(seen[n].mean_square * (seen[n].tokens / tokens) for n in names if n in seen)
        importance.update({name: together for name in names if name in rare})
    return importance


def input_scales(layers: Mapping[str, LayerPlan], seen: Seen) -> dict[str, torch.Tensor]:
    """The fixed scale of what enters each layer whose scheme has one; experts without tokens get their siblings'.

    Raises:
        ValueError: nothing is known of a layer's input.
    """
    siblings = {name: names for names in expert_groups(layers).values() for name in names}
    found = {}
    for name, plan in layers.items():
        if not plan.scheme.needs_input_range:
            continue
        known = [
            seen[other].largest for other in ((name,) if name in seen else siblings.get(name, ())) if other in seen
        ]
        if not known:
            raise ValueError(
                f"{name}: its scheme has a fixed scale for activations, and no calibration sample reaches the layer: "
                f"use a scheme with dynamic activations, data that reaches it, or keep it (ignore_layers={name!r})"
            )
        act = plan.scheme.act
        found[name] = data_type(act.data_type).input_scale(torch.stack(known).amax(0), act).cpu()
    return found
