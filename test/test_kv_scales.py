"""Fixed float8 scales of the KV cache and of attention: found where they should be, stored, resumed, loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny, tiny_llama, token_ids
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from auto_round import AutoRound
from auto_round.calibration.attention import attention_scales, cached_attentions, check_attentions, rounded_cache
from auto_round.cli.quantize import make_parser, settings_for
from auto_round.compressors.again import export_work
from auto_round.formats.export import check_attention
from auto_round.plan import PlanError
from auto_round.settings import AttentionSettings, SettingsError
from auto_round.store import Store

ATTENTION = {"static_kv_dtype": "fp8", "static_attention_dtype": "fp8"}
HEADS = {**ATTENTION, "static_kv_granularity": "head", "static_attention_granularity": "head"}


def prepare(model, **changes):
    arguments = {"scheme": "W4A16G32", "iters": 0, "disable_opt_rtn": True, "amp": False, "dataset": token_ids(8)}
    arguments |= {"nsamples": 8, "seqlen": 32, "device_map": "cpu", "show_progress": False}
    return AutoRound(model, **{**arguments, **changes})


def stored(folder):
    """Attention's scales in a written folder, and its quantization_config."""
    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    tensors = load_file(Path(folder) / "model.safetensors")
    return {n: t for n, t in tensors.items() if n.endswith(("q_scale", "k_scale", "v_scale"))}, config


@torch.no_grad()
def hooked(model, samples):
    """Largest magnitude per head, from the projections' outputs and the rotary embedding put on here."""
    outputs, largest = {}, {}
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "k_proj", "v_proj"))
    ]
    for ids in samples:
        model(ids)
        cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(ids.shape[1])[None])
        for name in cached_attentions(model):
            q, k, v = (
                outputs[f"{name}.{part}_proj"].view(1, ids.shape[1], -1, model.config.head_dim).transpose(1, 2)
                for part in "qkv"
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            for part, tensor in zip("qkv", (q, k, v), strict=True):
                key = f"{name}.{part}_scale"
                heads = tensor.abs().amax((0, 2, 3))
                largest[key] = torch.maximum(largest[key], heads) if key in largest else heads
    for handle in handles:
        handle.remove()
    return largest


def same(scale, largest):
    """Equal but for the rounding to bfloat16, and representable in it."""
    assert scale.dtype == torch.float32 and torch.equal(scale, scale.bfloat16().float())
    torch.testing.assert_close(scale, largest / 448, rtol=2**-8, atol=0)


@pytest.mark.parametrize("iters", [0, 2])
def test_scales_are_those_of_hooks(tmp_path, iters):
    want = hooked(tiny_llama(), token_ids(8))
    run = prepare(save_tiny(tiny_llama(), tmp_path / "tiny"), iters=iters, **ATTENTION)
    scales, config = stored(run.quantize_and_save(tmp_path / "out")[1])
    assert scales.keys() == want.keys() and len(scales) == 6
    for name, scale in scales.items():
        same(scale, want[name].amax().reshape(1))
    assert config["static_kv_dtype"] == config["static_attention_dtype"] == "fp8"
    assert {"attention scales", "loads in Transformers"} <= {check["name"] for check in run.report["checks"]}


def test_the_cache_alone(tiny_dir, tmp_path):
    made = prepare(tiny_dir, static_kv_dtype="float8_e4m3fn").quantize_and_save(tmp_path / "out")[1]
    scales, config = stored(made)
    assert {name.rpartition(".")[2] for name in scales} == {"k_scale", "v_scale"}
    assert config["static_kv_dtype"] == "fp8" and "static_attention_dtype" not in config


def test_nothing_without_being_asked_for(tiny_dir, tmp_path):
    scales, config = stored(prepare(tiny_dir).quantize_and_save(tmp_path / "out")[1])
    assert not scales and not [key for key in config if key.startswith("static_")]


def test_heads_have_their_own(tmp_path):
    want = hooked(tiny_llama(), token_ids(8))
    scales, _ = stored(prepare(save_tiny(tiny_llama(), tmp_path / "tiny"), **HEADS).quantize_and_save(tmp_path)[1])
    for name, scale in scales.items():
        assert scale.shape == ((4,) if name.endswith("q_scale") else (2,))
        same(scale, want[name])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_watching_changes_nothing(implementation):
    model = tiny_llama(torch.bfloat16)
    model.set_attn_implementation(implementation)
    ids, before = token_ids(1)[0], dict(vars(AttentionInterface))
    want = model(ids).logits
    settings = AttentionSettings(**HEADS)
    with attention_scales(settings, model, "model.layers.0") as scales:
        got = model(ids).logits
        assert not scales
    assert torch.equal(got, want) and torch.equal(model(ids).logits, want)
    assert scales.keys() == {f"model.layers.0.self_attn.{part}_scale" for part in "qkv"}
    assert dict(vars(AttentionInterface)) == before
    with rounded_cache(model, scales):
        assert not torch.equal(model(ids).logits, want)
    assert torch.equal(model(ids).logits, want)


def test_watching_ends_with_an_error():
    before = dict(vars(AttentionInterface))
    with pytest.raises(KeyError), attention_scales(AttentionSettings(**ATTENTION), tiny_llama(), "model.layers.0"):
        raise KeyError
    assert dict(vars(AttentionInterface)) == before


@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_compressed_tensors_computes_with_them(tmp_path, granularity):
    """Its model is compared with ours, keys and values rounded, when the folder is verified: bit for bit in float32."""
    from transformers import AutoModelForCausalLM

    source = save_tiny(tiny_llama(), tmp_path / "tiny")
    run = prepare(source, scheme="FP8_STATIC", static_kv_dtype="fp8", static_kv_granularity=granularity)
    folder = run.quantize_and_save(tmp_path / "out", format="llm_compressor")[1]
    scales, config = stored(folder)
    kind = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    assert config["kv_cache_scheme"] == {**kind, "strategy": "attn_head" if granularity == "head" else "tensor"}
    module = AutoModelForCausalLM.from_pretrained(folder).model.layers[1].self_attn
    for part in "kv":
        scale = scales[f"model.layers.1.self_attn.{part}_scale"]
        assert scale.shape == ((2, 1, 1) if granularity == "head" else (1,))
        assert torch.equal(getattr(module, f"{part}_scale"), scale)


def test_weights_alone_in_compressed_tensors(tmp_path):
    run = prepare(save_tiny(tiny_llama(torch.bfloat16), tmp_path / "tiny"), **ATTENTION)
    scales, config = stored(run.quantize_and_save(tmp_path / "out", format="llm_compressor")[1])
    assert len(scales) == 6 and config["kv_cache_scheme"]["strategy"] == "tensor"


def test_resumed_and_exported_again(tmp_path, monkeypatch):
    source = save_tiny(tiny_llama(num_hidden_layers=3), tmp_path / "tiny")
    whole = prepare(source, **ATTENTION).quantize_and_save(tmp_path / "whole")[1]
    save, saved = Store.save, []

    def failing(self, block, result):
        if saved:
            raise KeyboardInterrupt
        saved.append(block)
        save(self, block, result)

    monkeypatch.setattr(Store, "save", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, **ATTENTION).quantize_and_save(tmp_path / "parts")
    monkeypatch.setattr(Store, "save", save)
    run = prepare(source, **ATTENTION)
    parts = run.quantize_and_save(tmp_path / "parts")[1]
    assert [block["resumed"] for block in run.block_log] == [True, False, False]
    work = run.report["work_folder"]
    again = export_work(work, "llm_compressor", tmp_path / "again")
    want, _ = stored(whole)
    for folder in (parts, again):
        scales, _ = stored(folder)
        assert len(scales) == 9 and all(torch.equal(scales[name], want[name]) for name in want)
    with pytest.raises(PlanError, match="fake has no place for the scales that static_kv_dtype"):
        export_work(work, "fake", tmp_path / "refused")


def test_settings_are_part_of_the_work_folders_name(tiny_dir, tmp_path):
    for asked in ({}, {"static_kv_dtype": "fp8"}, ATTENTION):
        prepare(tiny_dir, **asked).quantize_and_save(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.work/*"))) == 3


def test_scales_of_the_source_give_way(tiny_dir, tmp_path):
    name, file = "model.layers.0.self_attn.k_scale", tiny_dir / "model.safetensors"
    save_file({**load_file(file), name: torch.tensor([7.0])}, file, {"format": "pt"})
    kept, _ = stored(prepare(tiny_dir).quantize_and_save(tmp_path / "kept")[1])
    assert kept[name] == 7.0
    run = prepare(tiny_dir, **ATTENTION)
    scales, _ = stored(run.quantize_and_save(tmp_path / "out")[1])
    assert scales[name] < 1 and run.report["ledger"]["dropped"] == 1


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fake", "auto_gptq", "auto_awq"])
def test_formats_without_a_place(tiny_dir, tmp_path, name):
    with pytest.raises(PlanError, match=f"{name} has no place for the scales that static_kv_dtype"):
        prepare(tiny_dir, static_kv_dtype="fp8").quantize_and_save(tmp_path / "out", format=name)
    assert not (tmp_path / "out").exists()


def test_a_format_is_asked_only_when_needed():
    check_attention(object(), {})


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"static_kv_dtype": "nvfp4"}, "static_kv_dtype='nvfp4' is not supported"),
        ({"static_attention_dtype": "int8"}, "use 'fp8'"),
        ({"static_kv_dtype": "fp8", "static_kv_granularity": "row"}, "'tensor' or 'head'"),
        ({"static_kv_granularity": "head"}, "needs static_kv_dtype"),
        ({**ATTENTION, "static_kv_granularity": "head"}, "differ"),
    ],
)
def test_settings(settings, words):
    with pytest.raises(SettingsError, match=words):
        AttentionSettings(**settings)


def test_attention_that_does_not_use_the_interface(tmp_path):
    run = prepare(tiny("bloom"), static_kv_dtype="fp8")
    with pytest.raises(PlanError, match=r"static_kv_dtype: .*\(BloomAttention\) does not call Transformers' attention"):
        run.quantize_and_save(tmp_path)


def test_compressed_keys_and_values():
    model = tiny("deepseek_v3")
    with pytest.raises(PlanError, match="compressed form"):
        check_attentions(model, AttentionSettings(**ATTENTION), [("model.layers.0", 0)])


def test_blocks_left_out(tiny_dir, tmp_path):
    run = prepare(tiny_dir, static_kv_dtype="fp8", to_quant_block_names="model.layers.0")
    with pytest.raises(PlanError, match=r"model\.layers\.1\.self_attn \(LlamaAttention\) is in no block"):
        run.quantize_and_save(tmp_path)


def test_blocks_called_again():
    calls = [("model.layers.0", 0), ("model.layers.1", 0), ("model.layers.0", 1)]
    with pytest.raises(PlanError, match=r"layers\.0\.self_attn .* called several times"):
        check_attentions(tiny_llama(), AttentionSettings(**ATTENTION), calls)


def test_innermost_attention_counts():
    names = cached_attentions(tiny("gpt_neo", attention_types=[[["global"], 2]], num_layers=2))
    assert names and all(name.endswith("attn.attention") for name in names)


def test_command_line():
    options = ["m", "--static_kv_dtype", "fp8", "--static_kv_granularity", "head"]
    found = settings_for(make_parser().parse(options))
    assert found["static_kv_dtype"] == "fp8" and found["static_kv_granularity"] == "head"
    assert "static_attention_dtype" not in found
