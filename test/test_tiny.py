"""Tiny clones made from a configuration alone: they build, compute, and stay what they were."""

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
)

from auto_round.doctor.tiny import levels, special_ids, text_batch, text_module, tiny_config, tiny_model

TYPES = {
    "llama": AutoModelForCausalLM,
    "mixtral": AutoModelForCausalLM,
    "gpt_oss": AutoModelForCausalLM,
    "gemma3": AutoModelForImageTextToText,
    "t5": AutoModelForSeq2SeqLM,
    "mamba2": AutoModelForCausalLM,
    "qwen3_next": AutoModelForCausalLM,
    "gemma3n_text": AutoModelForCausalLM,  # its images need timm
    "llava": AutoModelForImageTextToText,
    "deepseek_v3": AutoModelForCausalLM,
}
# One row or one column for each head, each expert, each gate or each kind of position: no matrix of a product.
FREE = ("gate.weight", "router.weight", "_bias", "relative_attention_bias.weight", "in_proj_ba.weight", "altup")


@pytest.mark.parametrize("name", TYPES)
def test_a_tiny_clone_computes(name):
    config = CONFIG_MAPPING[name]()
    before = config.to_dict()
    model = tiny_model(config, TYPES[name])
    assert config.to_dict() == before
    assert {type(level) for level in levels(model.config)} == {type(level) for level in levels(config)}
    batch = text_batch(model)
    assert batch["input_ids"].shape == (2, 24)
    assert not set(batch["input_ids"].unique().tolist()) & special_ids(model.config)
    with torch.no_grad():
        logits = text_module(model)(**batch).logits
    assert torch.isfinite(logits).all() and logits.std() > 0
    odd = {n: tuple(p.shape) for n, p in model.named_parameters() if p.dim() == 2 and any(s % 32 for s in p.shape)}
    odd = {n: s for n, s in odd.items() if "vision" not in n and not any(part in n for part in FREE)}
    assert not odd


def test_the_same_seed_gives_the_same_model():
    config = CONFIG_MAPPING["mixtral"]()
    first, second, other = (tiny_model(config, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_every_kind_of_layer_stays():
    small = tiny_config(CONFIG_MAPPING["qwen3_next"]())
    assert small.layer_types == ["linear_attention", "full_attention"]
    small = tiny_config(CONFIG_MAPPING["gemma3n_text"]())
    assert set(small.layer_types) == {"sliding_attention", "full_attention"}
    assert small.num_kv_shared_layers == 2 and small.num_hidden_layers == len(small.layer_types) == 6
    small = tiny_config(CONFIG_MAPPING["deepseek_v3"]())
    assert small.first_k_dense_replace == 1 and small.num_hidden_layers == 2
    assert small.qk_head_dim == small.qk_nope_head_dim + small.qk_rope_head_dim
    kinds = ["linear_attention", "moe", "linear_attention", "mlp", "full_attention", "mlp"] * 3
    small = tiny_config(CONFIG_MAPPING["nemotron_h"](layers_block_type=kinds))
    assert small.layers_block_type == ["linear_attention", "moe", "mlp", "full_attention"]
    small = tiny_config(CONFIG_MAPPING["jamba"]())
    assert small.layers_block_type.count("attention") == 1 and set(small.layers_num_experts) == {1, 4}


def test_what_is_switched_off_stays_off_and_what_is_small_stays_small():
    config = CONFIG_MAPPING["llama"](
        num_key_value_heads=1, tie_word_embeddings=True, attention_bias=True, vocab_size=64
    )
    small = tiny_config(config)
    assert small.num_key_value_heads == 1 and small.tie_word_embeddings and small.attention_bias
    assert small.vocab_size == 64
    assert tiny_config(CONFIG_MAPPING["deepseek_v3"](q_lora_rank=None)).q_lora_rank is None


def test_special_tokens_stay_inside_the_vocabulary_and_apart():
    small = tiny_config(CONFIG_MAPPING["qwen2_vl"]())
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = [getattr(small, name) for name in names]
    assert len(set(ids)) == len(ids) and max(ids) < small.text_config.vocab_size


def test_a_real_configuration_with_sections_of_rotary_pairs():
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config = CONFIG_MAPPING["qwen2_vl"](
        text_config={"rope_parameters": rope, "hidden_size": 3584, "num_attention_heads": 28}
    )
    assert tiny_config(config).text_config.rope_parameters["mrope_section"] == [4, 6, 6]
