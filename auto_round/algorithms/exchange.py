"""Quantized layers of one block that ranks have found apart, brought together on all of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load, save

from auto_round.data_type.base import QuantizedTensor
from auto_round.ranks import Ranks
from auto_round.schemes import TensorSpec

_EXTRA = "extra."


def exchanged(
    own: Mapping[str, QuantizedTensor], specs: Mapping[str, TensorSpec], ranks: Ranks
) -> dict[str, QuantizedTensor]:
    """All ranks' layers in the order of `specs` (layer name → what it is stored as), those of others on the CPU."""
    if ranks.world == 1:
        return dict(own)
    parts = {
        f"{place}:{key}": part for place, name in enumerate(specs) if name in own for key, part in _parts(own[name])
    }
    message = save({name: part.contiguous().cpu() for name, part in parts.items()})
    stored: dict[str, dict[str, torch.Tensor]] = {}
    for said in ranks.everyone(message):
        for name, part in load(said).items():
            place, _, key = name.partition(":")
            stored.setdefault(list(specs)[int(place)], {})[key] = part
    return {name: own[name] if name in own else _tensor(stored[name], spec) for name, spec in specs.items()}


def _parts(tensor: QuantizedTensor) -> list[tuple[str, torch.Tensor]]:
    fields = [(name, getattr(tensor, name)) for name in ("codes", "scale", "zero_point", "input_scale")]
    fields += [(f"{_EXTRA}{name}", value) for name, value in tensor.extra.items()]
    return [(name, value) for name, value in fields if value is not None]


def _tensor(parts: Mapping[str, torch.Tensor], spec: TensorSpec) -> QuantizedTensor:
    extra = {name.removeprefix(_EXTRA): part for name, part in parts.items() if name.startswith(_EXTRA)}
    return QuantizedTensor(
        parts["codes"], parts["scale"], parts.get("zero_point"), spec, extra, parts.get("input_scale")
    )
