"""The llm_compressor format, opened by compressed-tensors and by Transformers' loader for it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny, tiny_llama, token_ids
from transformers import AutoModelForCausalLM

from auto_round import AutoRound
from auto_round.data_type.base import QuantizedTensor
from auto_round.formats import make_format
from auto_round.modeling.checkpoint import CheckpointError
from auto_round.plan import LayerInfo, PlanError, make_plan
from auto_round.schemes import parse_scheme
from auto_round.verify.artifact import Artifact, layout_problem
from auto_round.verify.finished import verify_artifact
from auto_round.verify.packed import weight_args

compressed_tensors = pytest.importorskip("compressed_tensors")

DOWN = "model.layers.0.mlp.down_proj"
MIXED = {
    "layer_config": {"down_proj": {"bits": 8, "group_size": -1}, "k_proj": {"bits": 3}},
    "ignore_layers": "layers.1.self_attn.v_proj",
    "quant_lm_head": True,
}


def export(model, tmp_path, formats="llm_compressor,fake", **options):
    """(run, a folder for each format)"""
    source = save_tiny(model, tmp_path / "tiny")
    options = {"scheme": "W4A16G32", "iters": 0, "nsamples": 4, "seqlen": 32, **options}
    options.setdefault("dataset", token_ids(4))
    run = AutoRound(str(source), device_map="cpu", show_progress=False, **options)
    folders = run.quantize_and_save(tmp_path / "out", format=formats)[1]
    return run, *map(Path, [folders] if isinstance(folders, str) else folders)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@torch.no_grad()
def logits(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model, model(torch.cat(token_ids(2, 16))).logits


def client_weights(folder):
    """Layer → weight, by compressed-tensors: its schema finds the scheme, its decompressor the values."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_targets

    config = QuantizationConfig.model_validate(config_of(folder))
    schemes = {target: group for group in config.config_groups.values() for target in group.targets}
    tensors = load_file(folder / "model.safetensors")
    weights = {}
    for name in (name for name in tensors if name.endswith(".weight_packed")):
        layer = name.removesuffix(".weight_packed")
        own = {key[len(layer) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{layer}.weight_")}
        scheme = schemes[match_targets(layer, torch.nn.Linear(1, 1), schemes)[0]]
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        assert set(compressor.compression_param_names(scheme)) == own.keys()
        weights[layer] = compressor.decompress(own, scheme)["weight"]
    return weights


CASES = {
    "sym": {},
    "asym": {"sym": False},
    "sym per channel": {"scheme": "W8A16", "group_size": -1},
    "asym per channel": {"scheme": "W8A16", "group_size": -1, "sym": False},
    "per tensor": {"group_size": 0},
    "3 bits": {"scheme": "W3A16G32", "sym": False},
    "mixed": MIXED,
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_clients_read_our_weights(options, tmp_path):
    run, packed, floats = export(tiny_llama(), tmp_path, **options)
    assert "loads in Transformers" in [check["name"] for check in run.report["checks"]]
    ours = load_file(floats / "model.safetensors")
    theirs = client_weights(packed)
    assert len(theirs) == run.report["quantized_layers"][0]
    assert all(torch.equal(weight, ours[f"{layer}.weight"]) for layer, weight in theirs.items())
    model, got = logits(packed)
    assert torch.equal(got, logits(floats)[1])
    assert model.dtype == torch.float32


def test_bfloat16_models(tmp_path):
    """Scales stay float16: each client rounds the product to it, and then Transformers to bfloat16."""
    _, packed, floats = export(tiny_llama(torch.bfloat16), tmp_path, sym=False)
    ours = load_file(floats / "model.safetensors")
    for layer, weight in client_weights(packed).items():
        exact = Artifact.open(packed).weight(layer)
        assert weight.dtype == torch.float16 and torch.equal(weight, exact.half())
        assert torch.equal(ours[f"{layer}.weight"], exact.bfloat16())
    model, got = logits(packed)
    read = {name: value for name, value in model.state_dict().items() if "proj" in name}
    assert all(value.dtype == torch.bfloat16 for value in read.values())
    error = max(((value.float() - ours[n].float()).norm() / ours[n].float().norm()).item() for n, value in read.items())
    assert error < 2e-3
    want = logits(floats)[1]
    assert (got - want).norm() < 1e-2 * want.norm()


def test_config_names_what_is_kept(tmp_path):
    _, packed, _ = export(tiny_llama(tie_word_embeddings=True), tmp_path, ignore_layers="layers.1.self_attn.v_proj")
    config = config_of(packed)
    assert config["ignore"] == ["model.layers.1.self_attn.v_proj", "lm_head"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"] and len(config["config_groups"]) == 1
    stored = load_file(packed / "model.safetensors")
    assert stored[f"{DOWN}.weight_shape"].tolist() == [64, 128] and "model.layers.1.self_attn.v_proj.weight" in stored
    model, _ = logits(packed)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_config_of_a_mixed_plan(tmp_path):
    _, packed, _ = export(tiny_llama(), tmp_path, **MIXED)
    config = config_of(packed)
    weights = [group["weights"] for group in config["config_groups"].values()]
    assert sorted((args["num_bits"], args["strategy"]) for args in weights) == [
        (3, "group"),
        (4, "group"),
        (8, "channel"),
    ]
    assert "dequantize" not in config and config["ignore"] == ["model.layers.1.self_attn.v_proj"]
    assert weight_args(config, DOWN)["num_bits"] == 8 and weight_args(config, "lm_head")["num_bits"] == 4


def test_experts(tmp_path):
    model = tiny("mixtral")
    rules = {"self_attn": {"bits": 8, "sym": False}}
    _, packed, floats = export(model, tmp_path, layer_config=rules, disable_opt_rtn=True)
    gates = {f"model.layers.{index}.block_sparse_moe.gate" for index in (0, 1)}
    assert gates | {"lm_head"} <= set(config_of(packed)["ignore"])
    assert torch.equal(logits(packed)[1], logits(floats)[1])


def test_what_no_reader_takes_is_refused_before_any_work(tmp_path):
    names = ["a.0.q_proj", "a.0.experts.0.up_proj", "a.0.experts.1.up_proj"]

    def build(config=None, infos=names, **scheme):
        layers = [LayerInfo(name, 64, 64, "a.0", transposed=name == "conv") for name in infos]
        return make_format("llm_compressor", make_plan(layers, [["a.0"]], parse_scheme("W4A16G32", **scheme), config))

    build({"q_proj": {"bits": 8, "sym": False}})
    for match, arguments in {
        "same bits and group size": ({"o_proj": {"bits": 8}}, ["a.0.q_proj", "a.0.o_proj"]),
        "symmetric experts": ({"experts": {"bits": 8}},),
    }.items():
        with pytest.raises(PlanError, match=match):
            build(*arguments, sym=False)
    with pytest.raises(PlanError, match="need one scheme"):
        build({"experts.0": {"bits": 8}})
    with pytest.raises(PlanError, match="only if all are quantized"):
        build({"experts.0": {"bits": 16}})
    with pytest.raises(PlanError, match="Conv1D"):
        build(infos=["conv"])
    with pytest.raises(PlanError, match="nothing to export"):
        build(bits=16)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [True, False])
def test_bytes_are_compressed_tensors_own(bits, sym):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    scheme = parse_scheme("W4A16G32", bits=bits, sym=sym)
    plan = make_plan([LayerInfo("a.0.x", 96, 64, "a.0")], [["a.0"]], scheme)
    codes = torch.randint(0, 1 << bits, (96, 64)).to(torch.uint8)
    zeros = None if sym else torch.randint(0, 1 << bits, (96, 2)).to(torch.uint8)
    tensor = QuantizedTensor(codes, torch.rand(96, 2).half(), zeros, scheme.weight)
    packed = make_format("llm_compressor", plan).pack(tensor, plan.layers["a.0.x"].info)
    half = 1 << (bits - 1)
    assert torch.equal(packed["weight_packed"], pack_to_int32((codes.int() - half).to(torch.int8), bits))
    assert (zeros is None) == ("weight_zero_point" not in packed)
    if zeros is not None:
        signed = (zeros.int() - half).to(torch.int8)
        assert torch.equal(packed["weight_zero_point"], pack_to_int32(signed, bits, packed_dim=0))


def drop(tensors, config):
    del tensors[f"{DOWN}.weight_scale"]


def twice(tensors, config):
    tensors[f"{DOWN}.weight"] = torch.zeros(64, 128)


def ignored(tensors, config):
    config["ignore"].append(DOWN)


def untargeted(tensors, config):
    config["config_groups"]["group_0"]["targets"] = ["lm_head"]


def other_width(tensors, config):
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 8


def not_finite(tensors, config):
    tensors[f"{DOWN}.weight_scale"][0, 0] = torch.inf


@pytest.mark.parametrize("damage", [drop, twice, ignored, untargeted, other_width, not_finite])
def test_damage_is_found(damage, tmp_path):
    _, packed = export(tiny_llama(), tmp_path, "llm_compressor", disable_opt_rtn=True)
    assert verify_artifact(packed).passed and layout_problem(Artifact.open(packed)) is None
    tensors, config = load_file(packed / "model.safetensors"), json.loads((packed / "config.json").read_text())
    damage(tensors, config["quantization_config"])
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "report.json").unlink()
    try:
        assert not verify_artifact(packed).passed
    except CheckpointError as error:
        assert DOWN.split(".mlp")[0] in str(error)


def test_without_compressed_tensors_the_reload_is_left_out(tmp_path, monkeypatch):
    import transformers.utils

    monkeypatch.setattr(transformers.utils, "is_compressed_tensors_available", lambda *args: False)
    run, _ = export(tiny_llama(), tmp_path, "llm_compressor", disable_opt_rtn=True)
    assert any("compressed-tensors, which is not installed" in warning for warning in run.warnings)
    assert "loads in Transformers" not in [check["name"] for check in run.report["checks"]]


def test_experts_that_the_source_stores_fused_are_refused_before_any_work(tmp_path):
    tiny("gpt_oss").save_pretrained(tmp_path / "m")
    run = AutoRound(str(tmp_path / "m"), None, scheme="W4A16", group_size=32, iters=0, disable_opt_rtn=True)
    with pytest.raises(PlanError, match="stores the experts fused"):
        run.quantize_and_save(tmp_path / "out", format="llm_compressor")
    assert not run.block_log
