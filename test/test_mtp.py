"""Layers for multi-token prediction, which Transformers does not instantiate: 8 bits by rule, or as they are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_model, save_tiny, tiny_llama

from auto_round import AutoRound
from auto_round.compressors.afford import output_sizes, possible_sizes
from auto_round.compressors.again import export_work
from auto_round.plan import PlanError

RTN = {"scheme": "W4A16", "group_size": 32, "iters": 0, "disable_opt_rtn": True, "show_progress": False}
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR = (*LINEAR, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
FLOAT = ("eh_proj.weight", "enorm.weight", "shared_head.head.weight", "input_layernorm.weight")


def with_draft(folder: Path, block: str, source: str = "model.layers.1") -> Path:
    """A saved model beside whose last block one more stands, with what joins it to the model."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(7)
    for name in [name for name in tensors if name.startswith(f"{source}.")]:
        tensors[name.replace(source, block)] = torch.randn(tensors[name].shape, generator=generator) * 0.05
    hidden, size = tensors["model.embed_tokens.weight"].shape[1], tensors["model.embed_tokens.weight"].shape[0]
    shapes = ((hidden, 2 * hidden), (hidden,), (size, hidden))
    for name, shape in zip(FLOAT[:3], shapes, strict=True):
        tensors[f"{block}.{name}"] = torch.randn(shape, generator=generator) * 0.05
    save_file(tensors, file, {"format": "pt"})
    return folder


def quantized(folder: Path, out: Path, format: str = "auto_round", **changes):
    run = AutoRound(str(folder), **{**RTN, **changes})
    _, found = run.quantize_and_save(str(out), format=format)
    return run, Path(found)


@pytest.fixture(params=["model.layers.2", "mtp.layers.0", "model.mtp_layers.0", "model.nextn.0"])
def block(request) -> str:
    return request.param


def test_linear_layers_get_eight_bits_and_the_rest_stays(tmp_path, block):
    folder = with_draft(save_tiny(tiny_llama(torch.bfloat16), tmp_path / "tiny"), block)
    run, out = quantized(folder, tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    extra = json.loads((out / "config.json").read_text())["quantization_config"]["extra_config"]
    for name in LINEAR:
        stem = f"{block}.{name}"
        rows, columns = before[f"{stem}.weight"].shape
        assert after[f"{stem}.qweight"].shape == (columns * 8 // 32, rows)
        assert f"{stem}.weight" not in after and extra[stem]["bits"] == 8
    for name in FLOAT:
        assert torch.equal(after[f"{block}.{name}"], before[f"{block}.{name}"])
    report = json.loads((out / "report.json").read_text())
    reasons = {layer["name"]: layer["reason"] for layer in report["layers"]}
    assert "multi-token prediction" in reasons[f"{block}.self_attn.q_proj"]
    assert all(check["passed"] for check in report["checks"]) and run.plan.drafts == (block,)


def test_eight_bits_are_near_the_source(tmp_path):
    from auto_round.verify.artifact import Artifact

    folder = with_draft(save_tiny(tiny_llama(torch.bfloat16), tmp_path / "tiny"), "mtp.layers.0")
    _, out = quantized(folder, tmp_path / "out")
    stem = "mtp.layers.0.mlp.down_proj"
    source, found = load_file(folder / "model.safetensors")[f"{stem}.weight"], Artifact.open(out).weight(stem)
    error = (found.float() - source.float()).square().mean() / source.float().square().mean()
    assert 0 < error < 1e-4


def test_experts_of_the_block_too(tmp_path):
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_experts=4, num_experts_per_tok=1, vocab_size=320,
    )  # fmt: skip
    folder = with_draft(save_tiny(random_model(config, torch.bfloat16), tmp_path / "moe"), "mtp.layers.0")
    _, out = quantized(folder, tmp_path / "out")
    after = load_file(out / "model.safetensors")
    assert "mtp.layers.0.mlp.experts.3.up_proj.qweight" in after
    assert "mtp.layers.0.mlp.gate.weight" in after  # the router
    extra = json.loads((out / "config.json").read_text())["quantization_config"]["extra_config"]
    assert extra["mtp.layers.0.mlp.experts.3.up_proj"]["bits"] == 8


@pytest.mark.parametrize("format", ["llm_compressor", "auto_awq", "fake"])
def test_formats_without_a_place_for_them_leave_them(tmp_path, format):
    folder = with_draft(save_tiny(tiny_llama(torch.bfloat16), tmp_path / "tiny"), "model.layers.2")
    run, out = quantized(folder, tmp_path / "out", format, **({"sym": False} if format == "auto_awq" else {}))
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    names = [name for name in before if name.startswith("model.layers.2.")]
    assert all(torch.equal(after[name], before[name]) for name in names)
    layers = {one["name"]: one for one in json.loads((out / "report.json").read_text())["layers"]}
    assert layers["model.layers.2.mlp.up_proj"]["status"] == "kept"
    assert "multi-token prediction" in layers["model.layers.2.mlp.up_proj"]["reason"]
    if format == "llm_compressor":
        ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
        assert {"model.layers.2.mlp.up_proj", "model.layers.2.eh_proj"} <= set(ignored)
        assert any("leaves layers for multi-token prediction" in warning for warning in run.warnings)


def test_rules_reach_them(tmp_path):
    folder = with_draft(save_tiny(tiny_llama(torch.bfloat16), tmp_path / "tiny"), "mtp.layers.0")
    run, _ = quantized(folder, tmp_path / "out", ignore_layers="mtp")
    assert run.plan.drafts == ()
    with pytest.raises(PlanError, match="matches no layer"):
        AutoRound(str(save_tiny(tiny_llama(), tmp_path / "plain")), ignore_layers="mtp", **RTN)


def test_other_tensors_that_are_not_instantiated_stay(tmp_path):
    """A tower that the class leaves out has layers of the same names, and predicts nothing."""
    folder = with_draft(save_tiny(tiny_llama(torch.bfloat16), tmp_path / "tiny"), "vision.layers.5")
    run, out = quantized(folder, tmp_path / "out")
    assert run.plan.drafts == ()
    assert "vision.layers.5.mlp.up_proj.weight" in load_file(out / "model.safetensors")


def test_a_restart_and_another_format_find_their_codes(tmp_path):
    folder = with_draft(save_tiny(tiny_llama(torch.bfloat16), tmp_path / "tiny"), "model.layers.2")
    _, out = quantized(folder, tmp_path / "out")
    first = (out / "model.safetensors").read_bytes()
    _, out = quantized(folder, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == first
    report = json.loads((out / "report.json").read_text())
    again = export_work(report["work_folder"], "auto_round:gptqmodel", tmp_path / "again")
    assert "model.layers.2.mlp.up_proj.g_idx" in load_file(again / "model.safetensors")


@pytest.mark.parametrize("known", ["auto_round", "llm_compressor"])
def test_sizes_of_other_formats_count_them_as_they_are_stored(tmp_path, known):
    folder = with_draft(save_tiny(tiny_llama(torch.bfloat16), tmp_path / "tiny"), "mtp.layers.0")
    run = AutoRound(str(folder), **RTN)
    fmt = run.bind(known)
    sizes = possible_sizes(run, fmt, output_sizes(run, [fmt])[known])
    assert {"auto_round", "auto_gptq", "llm_compressor"} <= sizes.keys()
    assert sizes == {name: output_sizes(run, [run.bind(name)])[name] for name in sizes}
