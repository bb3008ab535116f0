"""A whole run for an engine: the format it loads, schemes that it can fuse, inputs rounded as it rounds them."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import save_tiny, text_samples, tiny_llama

from auto_round import AutoRound
from auto_round.compressors.again import export_work
from auto_round.formats import make_format
from auto_round.inference.load import load_model
from auto_round.modeling.checkpoint import CheckpointError
from auto_round.plan import LayerInfo, PlanError, make_plan
from auto_round.schemes import SchemeError, parse_scheme
from auto_round.verify.finished import verify_artifact
from auto_round.wrapper import InputQuantizer

QUICK = {"iters": 0, "nsamples": 4, "seqlen": 32, "show_progress": False, "device_map": "cpu"}
LAYER = "model.layers.0.self_attn.k_proj"


@pytest.fixture
def source(tmp_path):
    """A tiny Llama whose rows llama.cpp's super-blocks divide."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    return save_tiny(tiny_llama(dtype=torch.bfloat16, **sizes, head_dim=64), tmp_path / "source")


def test_llama_cpp_gets_its_usual_file(source, tmp_path):
    run = AutoRound(str(source), engine="llama.cpp", **QUICK)
    assert run.default_format == "gguf:q4_k_m"
    _, folder = run.quantize_and_save(tmp_path / "out")
    assert verify_artifact(folder).passed
    file = next((tmp_path / "out" / "source-gguf").glob("*.gguf"))
    logits = load_model(folder)(torch.arange(16)[None]).logits
    assert torch.isfinite(logits).all()
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        verify_artifact(folder)


def test_a_gguf_format_brings_its_mixture_unless_a_scheme_was_asked_for(source, tmp_path):
    run = AutoRound(str(source), **QUICK)
    run.quantize_and_save(tmp_path / "a", format="gguf:q2_k_s")
    assert {layer.scheme.bits for layer in run.plan.quantized().values()} >= {2, 6}
    plain = AutoRound(str(source), scheme="W4A16G32", disable_opt_rtn=True, **QUICK)
    plain.quantize_and_save(tmp_path / "b")
    report = json.loads((tmp_path / "b" / "source-w4g32" / "report.json").read_text())
    assert export_work(report["work_folder"], "gguf:q4_0", tmp_path / "c").is_dir()
    with pytest.raises(PlanError, match="Q4_K"):
        AutoRound(str(source), scheme="W3A16", **QUICK).quantize_and_save(tmp_path / "d", format="gguf:q4_k_m")


def test_what_an_engine_fuses_gets_one_scheme(source):
    run = AutoRound(str(source), engine="vllm", layer_config={"k_proj": {"bits": 8}}, **QUICK)
    assert run.plan.layers[LAYER.replace("k_proj", "q_proj")].scheme.bits == 8
    assert any("as one" in warning for warning in run.warnings)
    with pytest.raises(PlanError, match="mx_int"):
        AutoRound(str(source), engine="vllm", scheme="MXINT4", **QUICK)
    with pytest.raises(PlanError, match="did you mean 'vllm'"):
        AutoRound(str(source), engine="vlm", **QUICK)


def test_only_gguf_holds_a_quantized_embedding(source):
    run = AutoRound(str(source), scheme="GGUF:Q8_0", **QUICK)
    assert run.plan.layers["model.embed_tokens"].is_quantized
    with pytest.raises(PlanError, match="embed_tokens"):
        make_format("auto_round", run.plan)
    with pytest.raises(SchemeError, match="layer_config"):
        AutoRound(str(source), scheme="GGUF:Q4_K_M", group_size=16, **QUICK)


@pytest.mark.parametrize(("scheme", "scale"), [("FP8_STATIC", lambda m: m / 448), ("NVFP4", lambda m: 2688 / m)])
def test_fixed_scales_cover_what_calibration_saw(scheme, scale):
    model = tiny_llama()
    samples = text_samples(model)
    largest = []
    handle = model.get_submodule(LAYER).register_forward_pre_hook(lambda m, args: largest.append(args[0].abs().max()))
    for sample in samples:
        model(**(sample if isinstance(sample, dict) else {"input_ids": sample}))
    handle.remove()
    quantized, _ = AutoRound(model, scheme=scheme, dataset=samples, amp=False, **{**QUICK, "nsamples": 8}).quantize()
    hook = next(h for h in quantized.get_submodule(LAYER)._forward_pre_hooks.values() if isinstance(h, InputQuantizer))
    exact = scale(torch.stack(largest).max()).item()
    assert 0.5 * exact <= hook.input_scale.item() <= 1.01 * exact


def test_tuning_sees_rounded_inputs():
    losses = {}
    for scheme in ("MXFP4", parse_scheme("MXFP4", act_bits=16)):
        run = AutoRound(
            tiny_llama(), scheme=scheme, dataset=text_samples(tiny_llama()), amp=False, **{**QUICK, "iters": 1}
        )
        run.quantize()
        losses[run.scheme.act is None] = run.block_log[0]["start_loss"]
    assert losses[False] > 1.2 * losses[True] > 0


def test_experts_that_transformers_would_fuse_are_refused():
    names = {"name": "model.layers.0.mlp.experts.0.w1", "stored": "model.layers.0.block_sparse_moe.experts.0.w1"}
    layers = [LayerInfo(out_features=64, in_features=64, block="model.layers.0", **names)]
    plan = make_plan(layers, [["model.layers.0"]], parse_scheme("INT8"))
    with pytest.raises(PlanError, match="block_sparse_moe"):
        make_format("auto_round", plan)
