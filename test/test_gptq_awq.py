"""The GPTQ and AWQ formats: tensors read by a few lines of NumPy, configurations, refusals, and whole models."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import save_tiny, tiny_llama, token_ids

from auto_round import AutoRound
from auto_round.data_type.base import QuantizedTensor
from auto_round.formats import make_format
from auto_round.formats.base import TensorShape
from auto_round.inference.load import load_model
from auto_round.plan import LayerInfo, ModelPlan, PlanError, make_plan
from auto_round.schemes import parse_scheme
from auto_round.verify.artifact import Artifact
from auto_round.verify.finished import verify_artifact
from auto_round.verify.result import VerificationError

BLOCKS = [["model.layers.0", "model.layers.1"]]
PARTS = ("self_attn.q_proj", "mlp.down_proj")


def plan_for(infos: list[LayerInfo] | None = None, config=None, ignore=(), head=False, beside=None, **fields):
    if infos is None:
        infos = [LayerInfo(f"{block}.{part}", 64, 128, block) for block in BLOCKS[0] for part in PARTS]
        infos.append(LayerInfo("lm_head", 320, 128, None))
    scheme = parse_scheme("W4A16", **{"group_size": 32, **fields})
    return make_plan(infos, BLOCKS, scheme, config, ignore, "lm_head", head, beside)


def one_layer(out: int, columns: int, **fields) -> ModelPlan:
    return plan_for([LayerInfo("model.layers.0.a", out, columns, "model.layers.0")], **fields)


# ---- tensors ----------------------------------------------------------------------------------------------------


def tensor_for(plan: ModelPlan, seed: int) -> QuantizedTensor:
    """Random codes, zero points of the whole range with a first one of 0; asymmetric scales are positive."""
    layer = next(iter(plan.quantized().values()))
    generator = torch.Generator().manual_seed(seed)
    spec, rows, columns = layer.scheme.weight, layer.info.out_features, layer.info.in_features
    shape = (1, 1) if spec.group_size == 0 else (rows, columns // spec.group_size if spec.group_size > 0 else 1)
    codes = torch.randint(0, 1 << spec.bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = torch.randn(shape, generator=generator).half()
    if spec.sym:
        return QuantizedTensor(codes, scale, None, spec)
    zeros = torch.randint(0, 1 << spec.bits, shape, dtype=torch.uint8, generator=generator)
    zeros[0, 0] = 0
    return QuantizedTensor(codes, scale.abs(), zeros, spec)


def fields(words: torch.Tensor, bits: int) -> np.ndarray:
    """[n, words] → [n, codes] of a little-endian bit stream along each row."""
    octets = np.ascontiguousarray(words.numpy()).view(np.uint8)
    stream = np.unpackbits(octets, axis=-1, bitorder="little").reshape(len(words), -1, bits)
    return stream.astype(np.int32) @ (1 << np.arange(bits))


def read_gptq(packed: dict[str, torch.Tensor], bits: int) -> np.ndarray:
    codes, zeros = fields(packed["qweight"].t(), bits), fields(packed["qzeros"], bits).T + 1
    groups, scales = packed["g_idx"].numpy(), packed["scales"].float().numpy().T
    return scales[:, groups] * (codes - zeros[:, groups])


def read_awq(packed: dict[str, torch.Tensor]) -> np.ndarray:
    def columns(words: torch.Tensor) -> np.ndarray:
        slots = fields(words, 4).reshape(len(words), -1, 8)
        return slots[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(len(words), -1)

    codes, zeros, scales = columns(packed["qweight"]), columns(packed["qzeros"]), packed["scales"].float().numpy()
    size = len(codes) // len(scales)
    return (np.repeat(scales, size, 0) * (codes - np.repeat(zeros, size, 0))).T


SHAPES = {"rows": st.sampled_from([32, 64, 96]), "columns": st.sampled_from([64, 128]), "seed": st.integers(0, 99)}


def check_round_trip(name: str, plan: ModelPlan, seed: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Packs, compares with the layout, unpacks to the same; returns what was packed and the values that it means."""
    layer = next(iter(plan.quantized().values()))
    bound, tensor = make_format(name, plan), tensor_for(plan, seed)
    packed, rows = bound.pack(tensor, layer.info), tensor.per_row()
    assert {k: TensorShape(tuple(v.shape), v.dtype) for k, v in packed.items()} == bound.layout(layer)
    assert all(value.is_contiguous() for value in packed.values())
    back = bound.unpack(packed, layer)
    assert torch.equal(back.codes, rows.codes) and torch.equal(back.scale, rows.scale)
    assert (back.zero_point is None) == (rows.zero_point is None)
    assert rows.zero_point is None or torch.equal(back.zero_point, rows.zero_point)
    return packed, tensor.dequantize().numpy()


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 8]), sym=st.booleans(), group_size=st.sampled_from([-1, 0, 16, 32, 64]), **SHAPES)
@example(bits=8, sym=False, group_size=32, rows=32, columns=64, seed=0)
@example(bits=3, sym=False, group_size=0, rows=32, columns=64, seed=0)
def test_gptq_tensors(bits, sym, group_size, rows, columns, seed):
    plan = one_layer(rows, columns, bits=bits, sym=sym, group_size=group_size)
    packed, values = check_round_trip("auto_gptq", plan, seed)
    np.testing.assert_array_equal(read_gptq(packed, bits), values)


@settings(max_examples=25, deadline=None)
@given(sym=st.booleans(), group_size=st.sampled_from([-1, 0, 16, 32, 64]), **SHAPES)
def test_awq_tensors(sym, group_size, rows, columns, seed):
    packed, values = check_round_trip("auto_awq", one_layer(rows, columns, sym=sym, group_size=group_size), seed)
    np.testing.assert_array_equal(read_awq(packed), values)


def test_gptq_keeps_the_values_of_negative_asymmetric_scales():
    plan = one_layer(32, 64, sym=False, bits=2, group_size=16)
    layer, tensor = plan.layers["model.layers.0.a"], tensor_for(plan, 1)
    tensor = QuantizedTensor(tensor.codes, -tensor.scale, tensor.zero_point, tensor.spec)
    bound = make_format("auto_gptq", plan)
    packed = bound.pack(tensor, layer.info)
    np.testing.assert_array_equal(read_gptq(packed, 2), tensor.dequantize().numpy())
    assert torch.equal(bound.unpack(packed, layer).dequantize(), tensor.dequantize())


# ---- configurations ---------------------------------------------------------------------------------------------


def config_of(name: str, plan: ModelPlan) -> dict:
    config = make_format(name, plan).config({"iters": 7, "seqlen": None})
    assert config.pop("autoround_version") and "null" not in json.dumps(config)
    return config


def test_gptq_config_of_one_scheme():
    assert config_of("auto_gptq", plan_for(bits=8, sym=False, group_size=0)) == {
        "bits": 8,
        "data_type": "int",
        "group_size": -1,
        "sym": False,
        "iters": 7,
        "to_quant_block_names": "model.layers",
        "provider": "auto-round",
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "desc_act": False,
        "true_sequential": False,
        "damp_percent": 0.01,
        "lm_head": False,
    }


def test_gptq_config_of_several_schemes():
    rules = {"layers.0.self_attn.q_proj": {"bits": 8}, "lm_head": {"group_size": 64}}
    plan = plan_for(config=rules, ignore=["down_proj"], beside={"model.layers.1.mlp.gate": "router"})
    config = config_of("auto_gptq", plan)
    assert config["lm_head"] is True and config["to_quant_block_names"] == "model.layers,lm_head"
    assert config["modules_in_block_to_quantize"] == [["self_attn.q_proj", "lm_head"]]
    assert config["dynamic"] == {
        r"-:model\.layers\.0\.mlp\.down_proj$": {},
        r"-:model\.layers\.1\.mlp\.down_proj$": {},
        r"-:model\.layers\.1\.mlp\.gate$": {},
        r"+:model\.layers\.0\.self_attn\.q_proj$": {"bits": 8, "group_size": 32, "sym": True},
        r"+:lm_head$": {"bits": 4, "group_size": 64, "sym": True},
    }
    assert not any(re.match(key[2:], "model.layers.1.mlp.gate_proj") for key in config["dynamic"])


def test_stored_names_are_named_beside_the_modules():
    infos = [LayerInfo(f"{block}.a", 64, 64, block, stored=f"old.{block}.a") for block in BLOCKS[0]]
    plan = plan_for([*infos, LayerInfo("tower.b", 64, 64, None, stored="old.b")], config={"layers.1.a": {"bits": 8}})
    config = config_of("auto_gptq", plan)
    assert [key.replace("\\", "") for key in config["dynamic"]] == [
        "-:old.b$",
        "-:tower.b$",
        "+:old.model.layers.1.a$",
        "+:model.layers.1.a$",
    ]
    assert config["to_quant_block_names"] == "old.model.layers" and "modules_in_block_to_quantize" not in config
    awq = config_of("auto_awq", plan_for([*infos, LayerInfo("tower.b", 64, 64, None, stored="old.b")]))
    assert awq["modules_to_not_convert"] == ["old.b", "tower.b"]


@pytest.mark.parametrize("sym", [True, False])
def test_awq_config(sym: bool):
    plan = plan_for(sym=sym, ignore=["layers.1.mlp.down_proj"], beside={"model.layers.0.mlp.gate": "router"})
    assert config_of("auto_awq", plan) == {
        "bits": 4,
        "data_type": "int",
        "group_size": 32,
        "sym": False,
        "iters": 7,
        "to_quant_block_names": "model.layers",
        "zero_point": True,
        "version": "gemm",
        "provider": "auto-round",
        "quant_method": "awq",
        "modules_to_not_convert": ["model.layers.1.mlp.down_proj", "lm_head", "model.layers.0.mlp.gate"],
    }


@pytest.mark.parametrize("group_size", [0, -1, 32])
def test_transformers_takes_the_configs(group_size: int):
    from transformers import AutoRoundConfig, AwqConfig, GPTQConfig

    plan = plan_for(group_size=group_size)
    for name, kind in (("auto_gptq", GPTQConfig), ("auto_awq", AwqConfig)):
        config = config_of(name, plan)
        for parsed in (kind.from_dict(dict(config)), AutoRoundConfig.from_dict(dict(config))):
            assert parsed.bits == 4 and parsed.group_size == config["group_size"]


REFUSED = {
    "gptq, width": ("auto_gptq", {"bits": 5}, r"4 or 8 bits, not model.layers.0.self_attn.q_proj of 5"),
    "gptq, nothing": ("auto_gptq", {"bits": 16, "data_type": "float"}, "quantizes no layer"),
    "awq, width": ("auto_awq", {"bits": 3}, r"q_proj: it has 3 bits and the AWQ layout 4"),
    "awq, one other width": ("auto_awq", {"config": {"down_proj": {"bits": 8}}}, r"down_proj: it has 8 bits"),
    "awq, two group sizes": ("auto_awq", {"config": {"down_proj": {"group_size": 64}}}, r"is 64 .*q_proj 32"),
    "awq, group size": ("auto_awq", {"group_size": 8}, r"no AWQ kernel reads group size 8"),
    "awq, lm_head": ("auto_awq", {"head": True}, r"lm_head: readers of AWQ take layers outside"),
    "awq, names": ("auto_awq", {"beside": {"mlp.down": "router"}}, r"cannot keep mlp.down and quantize .*down_proj"),
}


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_reason(name: str, changes: dict, message: str):
    with pytest.raises(PlanError, match=message):
        make_format(name, plan_for(**changes))


@pytest.mark.parametrize("name", ["auto_gptq", "auto_awq"])
@pytest.mark.parametrize("changes", [{"act_bits": 8}, {"data_type": "mx_fp"}])
def test_only_integer_weights_are_held(name: str, changes: dict):
    plan = plan_for()
    layers = {n: dataclasses.replace(p, scheme=p.scheme.override(**changes)) for n, p in plan.quantized().items()}
    with pytest.raises(PlanError, match="integer weights with unquantized activations only"):
        make_format(name, dataclasses.replace(plan, layers=layers))


def test_gptq_refuses_other_layers_outside_the_blocks():
    infos = [LayerInfo("model.layers.0.a", 64, 64, "model.layers.0"), LayerInfo("tower.b", 64, 64, None)]
    with pytest.raises(PlanError, match=r"blocks and the lm_head only, not tower\.b"):
        make_format("auto_gptq", plan_for(infos, config={"tower.b": {"bits": 4}}))


# ---- whole models -----------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny model with some groups of weights above zero only, whose asymmetric zero point is 0."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:32].abs_()
    return save_tiny(model, tmp_path / "tiny")


def export(source: Path, folder: Path, name: str, **changes) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """The artifact (which passed the run's own checks), its logits, and those of the dequantized model."""
    options = {"scheme": "W4A16", "group_size": 32, "iters": 0, "disable_opt_rtn": True, **changes}
    run = AutoRound(str(source), device_map="cpu", show_progress=False, **options)
    folders = [Path(made) for made in run.quantize_and_save(folder, format=f"{name},fake")[1]]
    checks = json.loads((folders[0] / "report.json").read_text())["checks"]
    assert any(check["name"] == "loads in Transformers" for check in checks) and all(c["passed"] for c in checks)
    batch = torch.cat(token_ids(2, 16))
    with torch.no_grad():
        one, two = (load_model(made, dtype=torch.float32)(batch).logits for made in folders)
    return folders[0], one, two


MIXED = {"down_proj": {"bits": 8, "group_size": 64}, "layers.1.mlp.up_proj": {"bits": 3}}
RUNS = {
    "gptq mixed, lm_head": ("auto_gptq", {"layer_config": MIXED, "ignore_layers": "o_proj", "quant_lm_head": True}),
    "gptq asymmetric, mixed": ("auto_gptq", {"sym": False, "layer_config": MIXED, "ignore_layers": "1.self_attn"}),
    "awq asymmetric": ("auto_awq", {"sym": False, "ignore_layers": "layers.0.mlp"}),
    "awq symmetric": ("auto_awq", {}),
}


@pytest.mark.parametrize(("name", "changes"), RUNS.values(), ids=RUNS)
def test_whole_model(source: Path, tmp_path: Path, name: str, changes: dict):
    folder, got, want = export(source, tmp_path / "out", name, **changes)
    assert torch.allclose(got, want, atol=1e-4)
    assert verify_artifact(folder, source).passed
    if name == "auto_gptq" and not changes.get("sym", True):
        scales = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.scales"]
        assert (scales[:, :32] < 0).all() and (scales[:, 32:] > 0).all()


@pytest.mark.parametrize("name", ["auto_gptq", "auto_awq"])
def test_a_config_that_keeps_a_packed_layer_is_refused(source: Path, tmp_path: Path, name: str):
    folder = export(source, tmp_path / "out", name)[0]
    layer = "model.layers.0.mlp.up_proj"
    config = json.loads((folder / "config.json").read_text())
    lie = {"dynamic": {f"-:{layer}$": {}}, "modules_to_not_convert": [layer]}
    config["quantization_config"].update(lie)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match=f"{layer} is packed, but config.json says"):
        Artifact.open(folder).weight(layer)
