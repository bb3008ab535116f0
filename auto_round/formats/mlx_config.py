"""A model's config.json as mlx-lm reads it.

mlx-lm knows the fields of configurations as they were before Transformers 5, which renamed some and leaves out those
that have their default. What is missing is added; nothing is changed or taken away, so Transformers reads it as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SAME = (("num_experts", "num_local_experts"),)  # one number, under a model's own name and under Transformers'


def with_known_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config with the fields by which mlx-lm's models know what it says, in sub-configs too."""
    found = {
        key: with_known_fields(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != "quantization_config"
    }
    for key, value in _derived(config).items():
        if found.get(key) is None:
            found[key] = value
    return found


def head_dim(config: Mapping[str, Any], model_config: Any) -> int | None:
    """Width of an attention head, which a config may leave out: the model's own, or its share of the width."""
    stated = config.get("head_dim") or getattr(model_config, "head_dim", None)
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if stated is None and isinstance(width, int) and isinstance(heads, int) and heads and width % heads == 0:
        return width // heads
    return stated


def _derived(config: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping):
        fields |= _rope_fields(rope)
    for names in _SAME:
        stated = next((config[name] for name in names if config.get(name) is not None), None)
        fields |= {} if stated is None else dict.fromkeys(names, stated)
    interval = _interval(config.get("layer_types"))
    return fields if interval is None else {**fields, "full_attention_interval": interval}


def _interval(kinds: Any) -> int | None:
    """n where every n-th layer has full attention, and the others are linear; None where that is not so."""
    if not isinstance(kinds, Sequence) or set(kinds) != {"linear_attention", "full_attention"}:
        return None
    interval = kinds.index("full_attention") + 1
    expected = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(len(kinds))]
    return interval if list(kinds) == expected else None


def _rope_fields(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The former fields; models with two kinds of attention say theirs of full attention, and the local base."""
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    fields: dict[str, Any] = {"rope_scaling": None}
    kind = full.get("rope_type") or full.get("type") or "default"
    if kind != "default":
        fields["rope_scaling"] = {"type": kind, **full}
    if full.get("rope_theta") is not None:
        fields |= {"rope_theta": full["rope_theta"], "rotary_emb_base": full["rope_theta"]}
    if full.get("partial_rotary_factor") is not None:
        fields |= dict.fromkeys(("partial_rotary_factor", "rotary_pct"), full["partial_rotary_factor"])
    if isinstance(local, Mapping) and local.get("rope_theta") is not None:
        fields["rope_local_base_freq"] = local["rope_theta"]
    return fields
