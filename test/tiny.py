"""Tiny random models and a tiny tokenizer, made on the spot."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

VOCABULARY = 320


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer with the vocabulary of the tiny models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 3], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=512
    )


def random_model(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0, auto_class: Any = None) -> Any:
    """A model of that configuration with weights drawn from N(0, 0.05²), constant ones refilled."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = (auto_class or AutoModelForCausalLM).from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaConfig

    fields = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return random_model(LlamaConfig(**{**fields, **changes}), dtype, seed)


def tiny(model_type: str, task: str = "CausalLM", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model of a type for a task (`AutoModelFor…`), shrunk from its default configuration with `changes`."""
    import transformers

    from auto_round.doctor.tiny import tiny_model

    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no {model_type}")
    config = transformers.CONFIG_MAPPING[model_type](**changes)
    return tiny_model(config, getattr(transformers, f"AutoModelFor{task}"), dtype)


def text_samples(model: Any, count: int = 8, length: int = 32) -> list[Any]:
    """Calibration samples: ids [1, length], or dictionaries of what the model's forward needs beside them."""
    from auto_round.doctor.tiny import text_batch

    first = text_batch(model, 1, length)
    if first.keys() <= {"input_ids", "decoder_input_ids"}:
        ids = text_batch(model, count, length)["input_ids"]
        if ids.shape == (count, length):
            return list(ids.split(1))
    return [text_batch(model, 1, length, seed) for seed in range(count)]


def save_tiny(model: Any, folder: Path, shard: str = "5GB", tokenizer: bool = True) -> Path:
    """Save a model, with the tiny tokenizer and a file that belongs to neither."""
    model.save_pretrained(folder, max_shard_size=shard)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    (folder / "NOTICE.txt").write_text("carried over\n")
    return folder


def token_ids(count: int = 8, length: int = 32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 256, (1, length), generator=generator) for _ in range(count)]


def clean(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
