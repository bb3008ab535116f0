"""What a model is given: text as its forward takes it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

Sample = dict[str, torch.Tensor]

# Names of configuration fields that hold token ids with a meaning.
TOKEN_ID = r"(\w+_)?(token|bos|eos|pad|sep|cls|mask|unk|eod|start|end|newline|patch|nothink)_(id|ids|index)"


def sample_length(sample: Mapping[str, torch.Tensor]) -> int:
    """Number of positions of a sample."""
    ids = next((sample[key] for key in ("input_ids", "decoder_input_ids") if key in sample), None)
    ids = next(iter(sample.values())) if ids is None else ids
    return ids.shape[-1] if ids.dim() < 3 else ids.shape[1]


def complete_sample(model: nn.Module, sample: Mapping[str, torch.Tensor]) -> Sample:
    """A sample with what an encoder-decoder needs beside `input_ids`: the same text, shifted, for its decoder."""
    config = getattr(model, "config", None)
    sample = {key: _cast(model, value) for key, value in sample.items() if _accepts(model, key)}
    if not getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in sample or "input_ids" not in sample:
        return dict(sample)
    ids = sample["input_ids"]
    start = next(
        (
            value
            for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id")
            for value in [_find(config, key)]
            if isinstance(value, int)
        ),
        0,
    )
    shifted = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
    return {**sample, "decoder_input_ids": shifted}


def _accepts(model: nn.Module, key: str) -> bool:
    """Whether a model's forward names an argument; processors give some that only generation uses."""
    names = inspect.signature(model.forward).parameters
    return key in names or not {"input_ids", "inputs_embeds"}.intersection(names)


def _cast(model: nn.Module, value: torch.Tensor) -> torch.Tensor:
    """Pictures and sound in the model's dtype: processors give float32."""
    dtype = getattr(model, "dtype", None)
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def _find(config: Any, key: str) -> Any:
    value = getattr(config, key, None)
    if value is None and hasattr(config, "get_text_config"):
        value = getattr(config.get_text_config(decoder=True), key, None)
    return value


def random_text(model: nn.Module, rows: int, length: int, seed: int = 0) -> Sample:
    """Random token ids [rows, length] that have no special meaning to the model."""
    config = getattr(model, "config", None)
    size = vocabulary_size(model)
    special = special_ids(config)
    allowed = torch.tensor([token for token in range(size) if token not in special] or [0])
    generator = torch.Generator().manual_seed(seed)
    ids = allowed[torch.randint(0, len(allowed), (rows, length), generator=generator)]
    return complete_sample(model, {"input_ids": ids})


def vocabulary_size(model: nn.Module) -> int:
    """Number of tokens that the model embeds."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None)
    if isinstance(size, int):
        return size
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return max(sizes, default=32000)


def special_ids(config: Any) -> set[int]:
    """Token ids that a configuration, or one nested in it, gives a meaning to: padding, images, audio …"""
    return set(_named_ids(config.to_dict() if hasattr(config, "to_dict") else {}))


def _named_ids(values: Mapping[str, Any]) -> Iterator[int]:
    for key, value in values.items():
        if str(key) == "vocabulary_map" and isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, Mapping):
            yield from _named_ids(value)
        elif re.fullmatch(TOKEN_ID, str(key)):
            items = value if isinstance(value, (list, tuple)) else [value]
            yield from (item for item in items if isinstance(item, int))
