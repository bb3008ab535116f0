"""GGUF files: read back with the gguf package, loaded by Transformers, and refused where llama.cpp would not follow."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from gguf_runs import FAMILIES, GgufRun, family_model
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.formats.gguf import GgufFormat, model_name
from auto_round.formats.gguf_models import FAMILIES as KNOWN
from auto_round.formats.gguf_models import family_of, rope_tensors
from auto_round.formats.gguf_recipe import recipe
from auto_round.formats.gguf_tensors import row_order
from auto_round.formats.gguf_tokenizer import pre_tokenizer, tokenizer_values
from auto_round.plan import LayerInfo, LayerPlan, PlanError
from auto_round.schemes import GGUF_FILES, GGUF_TYPES, PRESET_SCHEMES
from auto_round.verify.gguf import as_llama_cpp, gguf_problems, reload_gguf_problem, unread_reason

gguf = pytest.importorskip("gguf")
KINDS = {scheme: kind for kind, scheme in GGUF_TYPES.items()}
IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    run = GgufRun(family_model("llama"), tmp_path_factory.mktemp("llama"))
    return run, *run.write(run.source.parent / "out")


# ---- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_file_holds_the_codes_and_transformers_computes_with_them(model_type, tmp_path):
    run = GgufRun(family_model(model_type), tmp_path)
    file, ledger = run.write(tmp_path / "out")
    assert gguf_problems(file, run.streamed, run.plan, run.store) is None
    assert ledger.fates.keys() == run.streamed.source_tensors().keys() and ledger.counts()["quantized"]
    config = run.streamed.model.config
    if unread_reason(config) is None:
        assert reload_gguf_problem(file, {"input_ids": IDS}, run.logits(IDS), config) is None


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss", "gemma2", "mixtral"])
def test_layers_that_are_kept_are_the_sources(model_type, tmp_path):
    run = GgufRun(family_model(model_type), tmp_path, None)
    file, ledger = run.write(tmp_path / "out")
    assert gguf_problems(file, run.streamed, run.plan, run.store) is None
    assert not ledger.of("quantized") and ledger.of("transformed")


@pytest.mark.parametrize("file_type", ["q4_0", "q8_0", "q2_k_s", "q3_k_l", "q5_k_m", "q6_k"])
def test_every_file_type_is_written(file_type, tmp_path):
    run = GgufRun(family_model("llama"), tmp_path, file_type)
    file, _ = run.write(tmp_path / "out")
    assert file.name == f"source-{file_type.upper()}.gguf"
    assert gguf_problems(file, run.streamed, run.plan, run.store) is None


def test_transformers_needs_no_configuration_for_a_llama(llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, file, _ = llama
    source = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    own = AutoTokenizer.from_pretrained(run.source)
    text = "The quick brown fox jumps  over 12 lazy dogs"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == own(text, add_special_tokens=False)["input_ids"]
    config = run.streamed.model.config
    assert model.config.num_key_value_heads == config.num_key_value_heads
    assert model.config.rms_norm_eps == pytest.approx(config.rms_norm_eps)


def test_the_folder_holds_one_file_and_the_header_says_what_it_is(llama):
    _, file, ledger = llama
    assert [path.name for path in file.parent.iterdir()] == ["source-Q4_K_M.gguf"]
    reader = gguf.GGUFReader(file)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["output.weight"] == "Q6_K" and kinds["token_embd.weight"] == "Q4_K"
    assert kinds["blk.0.attn_norm.weight"] == "F32" and kinds["blk.0.attn_q.bias"] == "F32"
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert ledger.fates["model.layers.0.self_attn.q_proj.bias"][0] == "transformed"


@pytest.mark.parametrize("damage", ["flip", "cut", "swap"])
def test_a_damaged_file_is_noticed(llama, tmp_path, damage):
    run, file, _ = llama
    data = bytearray(file.read_bytes())
    if damage == "flip":
        tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight")
        data[int(tensor.data_offset) + 40] ^= 1
    other = tmp_path / ("source-Q5_K_M.gguf" if damage == "swap" else file.name)
    other.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    problem = gguf_problems(other, run.streamed, run.plan, run.store)
    assert {"flip": "blk.1.ffn_up", "cut": "cannot be read", "swap": "file_type"}[damage] in problem


def test_too_little_space_is_said_before_anything_is_written(llama, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(9, 9, 1000))
    with pytest.raises(OSError, match="make room"):
        llama[0].write(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@given(st.integers(1, 6), st.integers(1, 8), st.sampled_from(["q rows", "k rows"]))
@settings(max_examples=30, deadline=None)
def test_rows_are_reordered_as_llama_cpp_reads_them(heads, half, edit):
    class Config:
        model_type = "llama"
        num_attention_heads = heads
        num_key_value_heads = heads

    rows = heads * half * 2
    values = np.arange(rows, dtype=np.float32)[:, None] + np.zeros((1, 3), np.float32)
    moved = as_llama_cpp(values, f"blk.0.attn_{edit[0]}.weight", Config)
    assert np.array_equal(moved[:, 0], row_order(edit, rows, Config).numpy())
    # Neighbours in the file are the two halves of a head.
    assert np.array_equal(moved[1::2, 0] - moved[::2, 0], np.full(rows // 2, half))


# ---- the mixture --------------------------------------------------------------------------------------------------


def chosen(file_type: str, model_type: str = "llama", **changes) -> dict[str, str]:
    config = family_model(model_type).config
    for name, value in changes.items():
        setattr(config, name, value)
    layers = []
    for block in range(config.num_hidden_layers):
        start = f"model.layers.{block}"
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layers.append(LayerInfo(f"{start}.self_attn.{leaf}", 256, 256, start))
        layers.append(LayerInfo(f"{start}.mlp.down_proj", 256, changes.get("intermediate_size", 256), start))
        layers.append(LayerInfo(f"{start}.mlp.gate", 256, 256, start, role="router"))
    head = LayerInfo("lm_head", 512, 256, None, tied=bool(changes.get("tie_word_embeddings")))
    layers += [head, LayerInfo("model.embed_tokens", 512, 256, None, role="embedding")]
    found = recipe(file_type, layers, config)
    assert all(reason for _, reason in found.values()) and found.keys() == {info.name for info in layers}
    return {name: KINDS.get(scheme, "kept") for name, (scheme, _) in found.items()}


def blocks_with(kinds: dict[str, str], leaf: str, kind: str) -> list[int]:
    return [int(name.split(".")[2]) for name, found in kinds.items() if name.endswith(leaf) and found == kind]


def test_more_bits_in_some_blocks():
    kinds = chosen("q4_k_m", num_hidden_layers=17)
    assert blocks_with(kinds, "v_proj", "Q6_K") == [0, 1, 4, 7, 10, 13, 14, 15, 16]
    assert blocks_with(kinds, "down_proj", "Q6_K") == [0, 1, 4, 7, 10, 13, 14, 15, 16]
    assert kinds["model.layers.3.self_attn.q_proj"] == "Q4_K" and kinds["model.layers.0.mlp.gate"] == "kept"
    assert kinds["lm_head"] == "Q6_K" and kinds["model.embed_tokens"] == "Q4_K"


@pytest.mark.parametrize(
    ("file_type", "values", "downs"),
    [
        ("q2_k", "Q3_K", "Q3_K"),
        ("q3_k_m", "Q5_K", "Q5_K"),
        ("q3_k_l", "Q5_K", "Q5_K"),
        ("q4_k_s", "Q5_K", "Q5_K"),
        ("q2_k_s", "Q2_K", "Q4_K"),
        ("q6_k", "Q6_K", "Q6_K"),
        ("q4_0", "Q4_0", "Q4_0"),
    ],
)
def test_the_first_block_of_16(file_type, values, downs):
    kinds = chosen(file_type, num_hidden_layers=16)
    first = "model.layers.0."
    assert (kinds[f"{first}self_attn.v_proj"], kinds[f"{first}mlp.down_proj"]) == (values, downs)


def test_shared_keys_eight_experts_and_the_largest_model():
    assert chosen("q2_k", num_attention_heads=8)["model.layers.0.self_attn.v_proj"] == "Q4_K"
    eight = chosen("q4_k_m", "mixtral", num_local_experts=8)
    assert [eight[f"model.layers.0.self_attn.{x}_proj"] for x in "kvo"] == ["Q8_0", "Q8_0", "Q5_K"]
    huge = chosen("q4_k_m", num_hidden_layers=80)
    assert blocks_with(huge, "v_proj", "Q5_K") and not blocks_with(huge, "v_proj", "Q4_K")


def test_shapes_and_ties_decide_too():
    assert chosen("q4_k_s", intermediate_size=288)["model.layers.1.mlp.down_proj"] == "Q5_0"
    assert chosen("q6_k", intermediate_size=288)["model.layers.1.mlp.down_proj"] == "Q8_0"
    assert chosen("q4_k_s", intermediate_size=272)["model.layers.1.mlp.down_proj"] == "kept"
    tied = chosen("q4_k_m", tie_word_embeddings=True)
    assert tied["lm_head"] == "kept" and tied["model.embed_tokens"] == "Q6_K"


def test_unknown_file_types_and_models_are_refused():
    with pytest.raises(PlanError, match="Q4_K_M"):
        chosen("q4_k_x")
    assert set(GGUF_FILES) >= {"Q4_K_M", "Q2_K_S"}


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 6}, "layer_types"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("llama", {"model_type": "bloom"}, "those that can: llama, mistral"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(model_type, changes, said):
    config = family_model(model_type).config
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(PlanError, match=said):
        family_of(config)


def changed_plan(run: GgufRun, name: str, **changes):
    layer = run.plan.layers[name]
    layers = {**run.plan.layers, name: LayerPlan(layer.info, dataclasses.replace(layer.scheme, **changes), "")}
    return dataclasses.replace(run.plan, layers=layers)


def test_plans_that_a_file_cannot_hold_are_refused(llama):
    run, name = llama[0], "model.layers.1.mlp.up_proj"
    for changes, said in (({"group_size": 64}, "no tensor type"), ({"act_bits": 8}, "activations")):
        with pytest.raises(PlanError, match=f"{name} cannot be written.*{said}"):
            GgufFormat(changed_plan(run, name, **changes), "gguf:q4_k_m")
    layer = run.plan.layers[name]
    odd = LayerPlan(dataclasses.replace(layer.info, in_features=288), layer.scheme, "")
    with pytest.raises(PlanError, match="blocks of 256"):
        GgufFormat(dataclasses.replace(run.plan, layers={name: odd}), "gguf:q4_k_m")
    with pytest.raises(PlanError, match="known: gguf:q4_0"):
        GgufFormat(run.plan, "gguf:q9")


def test_experts_of_a_block_have_one_type(tmp_path):
    run = GgufRun(family_model("qwen3_moe"), tmp_path)
    name = "model.layers.0.mlp.experts.1.up_proj"
    layer = LayerPlan(run.plan.layers[name].info, GGUF_TYPES["Q8_0"], "")
    with pytest.raises(PlanError, match="one scheme"):
        GgufFormat(dataclasses.replace(run.plan, layers={**run.plan.layers, name: layer}), "gguf:q4_k_m")


def test_a_missing_package_is_named(llama, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(PlanError, match=r"pip install 'auto-round\[gguf\]'"):
        GgufFormat(llama[0].plan, "gguf:q4_k_m")


def test_a_window_that_llama_cpp_ignores_is_said(llama, caplog):
    config = family_model("mistral", sliding_window=64).config
    with caplog.at_level(logging.WARNING, "auto_round"):
        GgufFormat(dataclasses.replace(llama[0].plan, config=config), "gguf:q4_k_m")
    assert "beyond 64 tokens" in caplog.text


# ---- configuration and tokenizer ----------------------------------------------------------------------------------


def test_scaled_rotations_are_divisors_of_frequencies():
    parameters = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    parameters |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = family_model("llama", rope_parameters=parameters).config
    factors = rope_tensors(config)["rope_freqs.weight"]
    assert factors.shape == (32,) and factors[0].item() == pytest.approx(1.0) and factors[-1].item() == pytest.approx(8)
    assert rope_tensors(family_model("llama").config) == {}


def steps(*names: str) -> list[dict]:
    known = {
        "bytes": {"type": "ByteLevel", "use_regex": False},
        "gpt2": {"type": "ByteLevel", "use_regex": True},
        "digits": {"type": "Digits", "individual_digits": True},
    }
    return [known.get(n) or {"type": "Split", "pattern": {"Regex": n}} for n in names]


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("parts", "whole", "name"),
    [
        (steps("gpt2"), False, "gpt-2"),
        (steps("digits", "gpt2"), False, "smollm"),
        (steps(LLAMA3, "bytes"), True, "llama-bpe"),
        (steps(LLAMA3, "bytes"), False, "dbrx"),
        (steps(LLAMA3.replace("{1,3}", ""), "bytes"), False, "qwen2"),
        (steps(GPT4O, "bytes"), False, "gpt-4o"),
    ],
)
def test_how_words_are_cut_is_recognized(parts, whole, name):
    assert pre_tokenizer(parts, whole) == name


def test_an_unknown_rule_for_words_is_said(caplog):
    with caplog.at_level(logging.WARNING, "auto_round"):
        assert pre_tokenizer(steps("[a-z]+", "bytes"), False) == "default"
    assert "other token ids" in caplog.text


def sentence_tokenizer(prefix: bool):
    """BPE over whole sentences with a byte fallback, as SentencePiece makes it."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    vocabulary = {text: i for i, text in enumerate(texts)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_tokenizers_have_scores(prefix):
    config = family_model("llama").config
    values = tokenizer_values(sentence_tokenizer(prefix), None, config)
    assert values["tokenizer_model"] == "llama" and values["add_space_prefix"] is prefix
    tokens, kinds, scores = (values[key] for key in ("token_list", "token_types", "token_scores"))
    assert len(tokens) == len(kinds) == len(scores) == config.vocab_size
    assert kinds[:4] == [2, 3, 3, 6] and tokens[-1].startswith("[PAD") and kinds[-1] == 5
    score = dict(zip(tokens, scores, strict=True))
    assert score["▁a"] > score["ab"] > score["▁ab"] > score["▁"]
    assert values["bos_token_id"] == 1 and values["add_bos_token"] is False


def test_byte_level_tokenizers_have_merges(tiny_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.chat_template = "{{ messages }}"
    values = tokenizer_values(tokenizer, None, family_model("llama").config)
    assert values["tokenizer_model"] == "gpt2" and values["tokenizer_pre"] == "gpt-2"
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert values["token_merges"] == [" ".join(pair) for pair in merges]
    assert values["token_types"][:3] == [3, 3, 3] and values["chat_template"] == "{{ messages }}"


def test_a_model_without_tokenizer_gets_no_vocabulary(caplog):
    with caplog.at_level(logging.WARNING, "auto_round"):
        assert tokenizer_values(None, None, family_model("llama").config) == {"tokenizer_model": "no_vocab"}
    assert "no vocabulary" in caplog.text


def test_names_of_models():
    from pathlib import Path

    config = family_model("llama").config
    assert model_name(Path("/data/My-Model"), config) == "My-Model"
    assert model_name(Path("/x/models--org--Name-1B/snapshots/0a1b"), config) == "Name-1B"
    assert set(FAMILIES) == set(KNOWN) and PRESET_SCHEMES["GGUF:Q4_K_M"] == GGUF_TYPES["Q4_K"]
