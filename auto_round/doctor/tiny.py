"""Tiny random clones of Transformers' text-generating models, made from a configuration alone.

A shrunken configuration keeps the class, the kinds of layers and their order, the activations, the tying, the biases,
the kind of rotary embedding and the structure of the experts; only sizes change. The sizes are found by the meaning
of a field's name, so that a type nobody has seen shrinks too; `EXCEPTIONS` holds what names cannot tell.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from auto_round.calibration.feed import TOKEN_ID, special_ids
from auto_round.doctor.sizes import (
    DROPPED,
    EXCEPTIONS,
    HEAD_DIM,
    HIDDEN,
    MAMBA_HEAD_DIM,
    MISSING,
    MOST_LAYERS,
    ORDINARY_ID,
    POSITIONS,
    RULES,
    VOCABULARY,
)

_COMPILED = [(re.compile(pattern), size) for pattern, size in RULES]


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A shrunken copy of a configuration: same class and architecture, with a hidden size of 128 and about 2 layers.

    Takes any configuration, nested ones too, and does not change it. Every kind of layer that the type mixes is kept
    once at least; a list with one entry per layer keeps the entries of the layers that stay.
    """
    return type(config).from_dict(_shrink(config, {}))


def _shrink(config: PreTrainedConfig, tokens: dict[int, int]) -> dict[str, Any]:
    """The fields of the shrunken configuration; `tokens` collects original special id -> new id over all levels."""
    fields = config.to_dict()
    standard = {real: name for name, real in type(config).attribute_map.items()}
    total = _layer_count(fields, standard)
    kept = _kept_layers(fields, total) if total else []
    shrunk: dict[str, Any] = {}
    for name, value in fields.items():
        if name in DROPPED:
            continue
        nested = config.__dict__.get(name)
        if isinstance(nested, PreTrainedConfig):
            shrunk[name] = _shrink(nested, tokens)
        elif standard.get(name, name) == "num_hidden_layers":
            shrunk[name] = len(kept)
        elif name == "per_layer_config":
            shrunk[name] = _shrink_overrides(value, fields, kept)
        elif isinstance(value, dict) and name.startswith("rope_"):
            shrunk[name] = _shrink_rope(value, _head_dim(fields, standard))
        elif kept and (_per_layer(value, total) or _layer_indices(name, value, total) or _counts(name)):
            shrunk[name] = _follow_layers(name, value, kept, total)
        elif re.fullmatch(TOKEN_ID + r"|\w*suppress_tokens", name):
            shrunk[name] = _each(value, lambda token: _new_token(token, tokens))
        else:
            shrunk[name] = _resize(name, standard.get(name, name), value)
    _make_consistent(fields, shrunk)
    model_type = fields.get("model_type") or ""
    for path, value in MISSING.get(model_type, {}).items():
        _put(shrunk, path, value, only_missing=True)
    for path, value in EXCEPTIONS.get(model_type, {}).items():
        _put(shrunk, path, value, only_missing=False)
    return shrunk


def _put(fields: dict[str, Any], path: str, value: Any, only_missing: bool) -> None:
    """Set a field; a path of several names leads into dictionaries, made where there is none."""
    *way, name = path.split(".")
    for step in way:
        fields[step] = fields = dict(fields.get(step) or {})
    if not only_missing or fields.get(name) is None:
        fields[name] = value


def _head_dim(fields: dict[str, Any], standard: dict[str, str]) -> int:
    """The original size of an attention head."""
    by_name = {standard.get(name, name): value for name, value in fields.items()}
    derived = (by_name.get("hidden_size") or 0) // (by_name.get("num_attention_heads") or 1)
    return by_name.get("head_dim") or derived or HEAD_DIM


# ---------------------------------------------------------------------------------------------------- which layers


def _layer_count(fields: dict[str, Any], standard: dict[str, str]) -> int:
    """The number of layers of a level: stated, or that of a list of their types; 0 if neither is there."""
    stated = next((fields[name] for name in fields if standard.get(name, name) == "num_hidden_layers"), None)
    if isinstance(stated, int):
        return stated
    lists = (fields.get(name) for name in ("layers_block_type", "layer_types"))
    return next((len(kinds) for kinds in lists if isinstance(kinds, (list, tuple))), 0)


def _per_layer(value: Any, total: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == total > 1


def _layer_indices(name: str, value: Any, total: int) -> bool:
    """Whether a list names layers by their numbers (`cross_attention_layers`, `fullatt_block_indexes`)."""
    if not isinstance(value, (list, tuple)) or not value or not re.search(r"layer|index|idx|block", name):
        return False
    return all(type(v) is int and 0 <= v < total for v in value) and list(value) == sorted(set(value))


def _counts(name: str) -> str | None:
    """What a number that counts layers from one end counts: the first ones, the last ones, or every n-th."""
    if re.fullmatch(r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", name):
        return "first"
    if name == "num_kv_shared_layers":
        return "last"
    if re.fullmatch(r"\w*(sparse_step|layer_period|moe_layer_interval|layer_step|every_n_layers)", name):
        return "every"
    return "end" if re.fullmatch(r"max_window_layers|moe_layer_end_index", name) else None


def _kept_layers(fields: dict[str, Any], total: int) -> list[int]:
    """The first layer of every kind, in order: at least two, and enough for each period and pattern."""
    kinds: dict[Any, int] = {}
    least = 2
    lists = [(n, v) for n, v in fields.items() if _per_layer(v, total) and list(v) != list(range(total))]
    indices = [v for n, v in fields.items() if not _per_layer(v, total) and _layer_indices(n, v, total)]
    for layer in range(total):
        kind = [repr(v[layer]) if not re.search("source_layers", n) else v[layer] == layer for n, v in lists]
        kind += [layer in v for v in indices]
        for name, value in fields.items():
            if isinstance(value, int) and _counts(name) in ("first", "last"):
                kind.append(layer < value if _counts(name) == "first" else layer >= total - value)
        kind.append(repr(sorted(_override(fields, layer).items())))
        kinds.setdefault(tuple(kind), layer)
    for name, value in fields.items():
        if isinstance(value, int) and value > 1 and _counts(name) == "every":
            least = max(least, _period(name, value))
        if isinstance(value, (list, tuple)) and re.search(r"(block|layer)\w*types?$", name) and len(value) < total:
            least = max(least, len(value))
    kept = sorted(kinds.values())[:MOST_LAYERS]
    spare = [layer for layer in range(total) if layer not in kept]
    return sorted(kept + spare[: max(0, least - len(kept))])


def _override(fields: dict[str, Any], layer: int) -> dict[str, Any]:
    return next((o for i, o in (fields.get("per_layer_config") or {}).items() if int(i) == layer), {})


def _period(name: str, value: int) -> int:
    return min(value, 4 if name.endswith("period") else 2)


def _follow_layers(name: str, value: Any, kept: list[int], total: int) -> Any:
    """A field that speaks of layers, put in terms of those that stay."""
    if _per_layer(value, total):
        if list(value) == list(range(total)):
            return list(range(len(kept)))
        if re.search("source_layers", name):
            return [kept.index(value[i]) if value[i] in kept else new for new, i in enumerate(kept)]
        picked = [value[i] for i in kept]
        return [_resize(name, name, v) for v in picked] if _resize(name, name, picked) is not picked else picked
    if isinstance(value, (list, tuple)):
        return [new for new, i in enumerate(kept) if i in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    way = _counts(name)
    if way == "every":
        return _period(name, value) if value > 1 else value
    if way == "end":
        return min(value, len(kept))
    return sum(i < value if way == "first" else i >= total - value for i in kept)


def _shrink_overrides(overrides: Any, fields: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """Per-layer overrides of the layers that stay: sizes keep their ratio to the size that they override."""
    shrunk = {}
    for new, layer in enumerate(kept):
        own = {}
        for name, value in _override({"per_layer_config": overrides}, layer).items():
            usual, small = fields.get(name), _resize(name, name, fields.get(name))
            own[name] = _resize(name, name, value)
            if isinstance(usual, int) and isinstance(value, int) and usual and name == "head_dim":
                own[name] = small * max(1, round(value / usual))
        if own:
            _make_consistent(_override({"per_layer_config": overrides}, layer), own)
            shrunk[str(new)] = own
    return shrunk


# ------------------------------------------------------------------------------------------------------ which sizes


def _each(value: Any, change: Any) -> Any:
    """Apply a change to an integer, or to every integer of a list; anything else stays."""
    if isinstance(value, (list, tuple)):
        return [_each(v, change) for v in value]
    return change(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _new_token(token: int, tokens: dict[int, int]) -> int:
    """The id inside the small vocabulary: ordinary ids stay, others are dealt out from the top, equal ones alike."""
    return token if token < ORDINARY_ID else tokens.setdefault(token, VOCABULARY - 4 - len(tokens))


def _resize(name: str, standard: str, value: Any) -> Any:
    """The small value of a field, by its own name or by the standard name that the class gives it."""
    if name in ("vocabulary_map",) and isinstance(value, dict):
        return {key: VOCABULARY - 12 - i for i, key in enumerate(list(value)[:8])}
    if re.fullmatch(r"\w*feature_layers?", name):
        return _rank(value)
    for candidate in (name, standard):
        for pattern, size in _COMPILED:
            if pattern.fullmatch(candidate):
                return value if size is None else _each(value, lambda old, size=size: _sized(old, size))
    return value


def _rank(value: Any) -> Any:
    """Numbers of layers of another level, put into two layers: the last one, and for lower numbers the first."""
    if isinstance(value, (list, tuple)):
        return [(1 if v == max(value) else 0) if isinstance(v, int) and v >= 0 else v for v in value]
    return min(value, 1) if isinstance(value, int) else value


def _sized(old: int, size: int) -> int:
    if old <= 0:
        return old
    return min(old, -size) if size < 0 else size


def _shrink_rope(parameters: Any, head: int) -> Any:
    """Rotary parameters: what lists pairs of channels, or sections of them, shrinks with the head."""
    if not isinstance(parameters, dict):
        return parameters
    shrunk = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            value = _shrink_rope(value, head)
        elif name.endswith("_section") and isinstance(value, (list, tuple)):
            parts = [v * HEAD_DIM // head for v in value]
            value = [sum(value) * HEAD_DIM // head - sum(parts[1:]), *parts[1:]]
        elif name in ("long_factor", "short_factor") and isinstance(value, (list, tuple)):
            value = list(value[: len(value) * HEAD_DIM // head])
        elif name.endswith("max_position_embeddings") and isinstance(value, int):
            value = min(value, POSITIONS)
        shrunk[name] = value
    return shrunk


def _make_consistent(fields: dict[str, Any], shrunk: dict[str, Any]) -> None:
    """Relations between sizes that hold in the original and that single names cannot keep."""
    same = [("num_key_value_heads", "num_attention_heads"), ("topk_group", "n_group")]
    same += [("linear_num_key_heads", "linear_num_value_heads"), ("topk_group", "num_expert_group")]
    same += [(f"{side}_num_key_value_heads", f"{side}_num_attention_heads") for side in ("encoder", "decoder", "swa")]
    for small, large in same:
        if fields.get(small) is not None and fields.get(small) == fields.get(large):
            shrunk[small] = shrunk[large]
        elif small == "topk_group" and fields.get(small) and fields.get(large):
            shrunk[small] = 1
    parts = ("qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim")
    if all(isinstance(fields.get(name), int) for name in parts):
        shrunk[parts[0]] = shrunk[parts[1]] + shrunk[parts[2]]
        if fields.get("head_dim") == fields[parts[0]]:
            shrunk["head_dim"] = shrunk[parts[0]]
    inner = fields.get("expand", 0) * fields.get("hidden_size", 0)  # a state space model
    if inner and inner == fields.get("num_heads", 0) * fields.get("head_dim", 0):
        shrunk |= {"num_heads": fields["expand"] * HIDDEN // MAMBA_HEAD_DIM, "head_dim": MAMBA_HEAD_DIM}
    for name, period in fields.items():
        offset = name.removesuffix("period") + "offset"
        if name.endswith("_period") and offset in fields:
            shrunk[offset] = fields[offset] * shrunk[name] // period
    _fill_none(fields, shrunk)
    for name in ("head_dim", "attention_head_dim"):  # some state the width of the queries as a multiple of the model's
        heads, width = fields.get("num_attention_heads"), fields.get("attention_hidden_size")
        if name in fields and heads and width and fields[name] * heads == width:
            shrunk["attention_hidden_size"] = HIDDEN * width // fields["hidden_size"]
            shrunk[name] = shrunk["attention_hidden_size"] // shrunk["num_attention_heads"]


def _fill_none(fields: dict[str, Any], shrunk: dict[str, Any]) -> None:
    """Sizes that the defaults of some classes leave None, and that every class then derives like this."""
    if "head_dim" in fields and fields["head_dim"] is None:
        shrunk["head_dim"] = HEAD_DIM
    if "num_key_value_heads" in fields and fields["num_key_value_heads"] is None:
        shrunk["num_key_value_heads"] = shrunk.get("num_attention_heads")
    if isinstance(fields.get("moe_intermediate_size"), int):
        for name, size in (("n_routed_experts", 4), ("num_experts_per_tok", 2)):
            if name in fields and fields[name] is None:
                shrunk[name] = size


# -------------------------------------------------------------------------------------------------------- the model


def random_weights(model: PreTrainedModel, seed: int = 0) -> None:
    """Fill a model's weights in place with N(0, 0.05²), the same for the same seed.

    Parameters of two dimensions and more are all filled. Norms and biases (one dimension and none) stay as the class
    initialised them, unless it left them as memory held them: not finite, above 1e3 or below 1e-30.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or (parameter.dim() < 2 and not _garbage(parameter)):
                continue
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.05
            parameter.copy_(drawn.to(parameter.dtype))


def _garbage(tensor: torch.Tensor) -> bool:
    size = tensor.detach().float().abs()
    return not bool((torch.isfinite(size) & (size < 1e3) & ((size == 0) | (size > 1e-30))).all())


def tiny_model(
    config: PreTrainedConfig, auto_class: Any = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A tiny random model of the architecture that a configuration describes, in eval mode.

    auto_class: an auto class of Transformers or a model class; by default the first of `config.architectures`, and
    without one the first auto class that knows the configuration.
    """
    small = tiny_config(config)
    return build(small, auto_class or model_class(config), dtype, seed)


def build(
    config: PreTrainedConfig, auto_class: Any, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A model of a configuration as it stands, with random weights, in eval mode."""
    torch.manual_seed(seed)
    made = auto_class._model_mapping[type(config)] if hasattr(auto_class, "_model_mapping") else auto_class
    wanted = getattr(made, "config_class", None) or type(config)
    # The class of a part (a decoder) takes the configuration of that part.
    config = next((level for level in levels(config) if isinstance(level, wanted)), config)
    deterministic = torch.are_deterministic_algorithms_enabled()
    # What a class allocates and forgets to initialise is then NaN rather than whatever the memory held.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model = made._from_config(config, dtype=dtype).eval()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    random_weights(model, seed)
    for buffer in model.buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            buffer.nan_to_num_(nan=0.0, posinf=float("inf"), neginf=float("-inf"))
    return model


def model_class(config: PreTrainedConfig) -> Any:
    """The class that a configuration names, or the first auto class of a text-generating task that knows it."""
    import transformers

    for name in config.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    tasks = ("CausalLM", "ImageTextToText", "MultimodalLM", "Seq2SeqLM", "SpeechSeq2Seq")
    for auto in (getattr(transformers, f"AutoModelFor{task}") for task in tasks):
        if type(config) in auto._model_mapping:
            return auto
    raise ValueError(f"{type(config).__name__} belongs to no text-generating task of Transformers")


# -------------------------------------------------------------------------------------------------------- the input


def levels(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in config.__dict__.values():
        if isinstance(value, PreTrainedConfig):
            yield from levels(value)


def _lookup(config: PreTrainedConfig, *names: str) -> Any:
    """The first value of one of these names at any level."""
    for name in names:
        for level in levels(config):
            if level.__dict__.get(level.attribute_map.get(name, name)) is not None:
                return level.__dict__[level.attribute_map.get(name, name)]
    return None


def text_module(model: PreTrainedModel) -> PreTrainedModel:
    """The module whose forward takes text: the model, or its first part that does if it has no forward of its own."""
    if type(model).forward is not torch.nn.Module.forward:
        return model
    return next(m for m in model.children() if isinstance(m, PreTrainedModel) and hasattr(m, "generate"))


def text_batch(model: PreTrainedModel, batch: int = 2, length: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """A text-only input of a model: `input_ids` [batch, length], and `decoder_input_ids` where there is a decoder.

    Ids are ordinary ones (no padding, no image). Models that refuse text alone get the smallest tensors of what they
    ask for besides (pixels, spectrogram frames, codebooks, ...): found by trying their forward.
    """
    model = text_module(model)
    generator = torch.Generator().manual_seed(seed)
    ids = token_ids(model, batch, length, generator)
    accepted = set(inspect.signature(model.forward).parameters)
    text = {"input_ids": ids} if "input_ids" in accepted else {}
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted:
        text["decoder_input_ids"] = ids.flip(0)[:, : max(2, length // 2)].clone()
    refusals: list[str] = []
    for extra in ({}, *_more_than_text(model, ids, accepted, generator)):
        candidate = {name: tensor for name, tensor in {**text, **extra}.items() if tensor is not None}
        try:
            with torch.no_grad():
                model(**candidate)
            return candidate
        except Exception as e:  # whatever a forward raises on what it cannot take
            refusals.append(f"{'+'.join(extra) or 'text'}: {e}")
    raise ValueError(f"{type(model).__name__} takes no such input: {' / '.join(refusals)}")


def token_ids(model: PreTrainedModel, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Random ids [batch, length] inside every vocabulary that they may be looked up in, special ones left out."""
    sizes = [_lookup(model.config.get_text_config(), "vocab_size") or VOCABULARY]
    if model.config.is_encoder_decoder:
        sizes += [v for level in levels(model.config) if (v := level.__dict__.get("vocab_size"))]
    with contextlib.suppress(AttributeError, NotImplementedError):  # composites without one table of their own
        sizes.append(getattr(model.get_input_embeddings(), "num_embeddings", sizes[0]))
    special = special_ids(model.config)
    allowed = torch.tensor([i for i in range(min(3, min(sizes) - 1), min(sizes)) if i not in special])
    return allowed[torch.randint(len(allowed), (batch, length), generator=generator)]


def _more_than_text(
    model: PreTrainedModel, ids: torch.Tensor, accepted: set[str], generator: torch.Generator
) -> Iterator[dict[str, torch.Tensor | None]]:
    """What may have to go with the text (or in its place), by the names that the forward takes; the least first."""
    config, (batch, length) = model.config, ids.shape
    beside: dict[str, torch.Tensor | None] = {}
    if "qformer_input_ids" in accepted:
        beside["qformer_input_ids"] = ids
    if "bbox" in accepted:
        beside["bbox"] = torch.zeros(batch, length, 4)
    if "image_embeds_position_mask" in accepted:
        places = torch.arange(length) < (_lookup(config, "latent_query_num") or 0)
        beside["image_embeds_position_mask"] = places.expand(batch, length).clone()
    if "image_attention_mask" in accepted:
        beside["image_attention_mask"] = torch.ones(batch, length, 1, dtype=torch.long)
    if beside:
        yield beside
    for name, shape in _media_shapes(config, batch, length):
        if name in accepted:
            media = torch.randn(shape, generator=generator)
            if name == "flattened_patches":  # each starts with its row and its column
                media[..., :2] = torch.arange(1, shape[1] + 1)[:, None] % 8
            yield {name: media, **beside}
    yield {"decoder_input_ids": None}
    if books := _lookup(config, "num_codebooks"):
        yield {"input_ids": ids.repeat(books, 1)}
        yield {"input_ids": ids[..., None].repeat(1, 1, books + 1)}


def _media_shapes(config: PreTrainedConfig, batch: int, length: int) -> list[tuple[str, tuple[int, ...]]]:
    image, channels = _lookup(config, "image_size") or 32, _lookup(config, "num_channels") or 3
    sides = tuple(image) if isinstance(image, (list, tuple)) else (image, image)
    shapes: list[tuple[str, tuple[int, ...]]] = [("pixel_values", (batch, channels, *sides))]
    shapes.append(("pixel_values", (batch, 1, channels, *sides)))
    mel, frames = _lookup(config, "num_mel_bins", "feature_size"), 2 * (_lookup(config, "max_source_positions") or 32)
    if mel:
        shapes.append(("input_features", (batch, mel, frames)))
        shapes.append(("input_features", (batch, mel, length * (_lookup(config, "audio_length_per_tok") or 1))))
    width = _lookup(config, "input_feat_per_channel", "feature_projection_input_dim", "hidden_size")
    shapes += [("input_features", (batch, frames, width)), ("input_values", (batch, 4000))]
    shapes.append(("flattened_patches", (batch, 16, 2 + (_lookup(config, "patch_embed_hidden_size") or 0))))
    return shapes
