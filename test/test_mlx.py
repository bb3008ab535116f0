"""The mlx format: layout, what readers compute, what is refused, and the model's config as mlx-lm needs it."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from auto_round.data_type.base import WeightTask
from auto_round.data_type.int import quantize
from auto_round.formats import make_format
from auto_round.formats.base import Place, TensorShape
from auto_round.formats.mlx import WIDTHS
from auto_round.formats.mlx_config import with_known_fields
from auto_round.formats.mlx_models import EXPERT_NAMES, MODEL_TYPES, REPACKS_KV_B, STACKS_EXPERTS
from auto_round.modeling.checkpoint import Checkpoint, CheckpointError
from auto_round.plan import LayerInfo, PlanError, make_plan
from auto_round.schemes import parse_scheme
from auto_round.verify.mlx import UnstackedCheckpoint, is_mlx, mlx_layers, mlx_problem, open_mlx, read_mlx

LLAMA = {"model_type": "llama"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make(scheme="W4A16G32", names=("up_proj", "down_proj"), inputs=64, dtype=torch.bfloat16, info=None, **rules):
    infos = [
        LayerInfo(f"model.layers.0.mlp.{n}", 32, inputs, "model.layers.0", dtype=dtype, **(info or {})) for n in names
    ]
    infos.append(LayerInfo("lm_head", 96, inputs, None, dtype=dtype))
    return make_plan(infos, [["model.layers.0"]], parse_scheme(scheme), **rules)


def packed_layer(scheme, dtype, inputs=128, seed=0, **changes):
    """(format, layer, quantized tensor) of a random layer."""
    plan = make({"scheme": scheme, **changes}, inputs=inputs, dtype=dtype)
    layer = next(iter(plan.quantized().values()))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, inputs, generator=generator) * 0.05 + 0.01
    return make_format("mlx", plan), layer, quantize(WeightTask(weight, layer.scheme.weight))


def mlx_dequantize(tensors, bits):
    """scales · code + biases in float64, bit by bit from the words."""
    words = tensors["weight"].view(torch.int32).numpy().view(np.uint32)
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    codes = (stream.reshape(len(words), -1, bits) << np.arange(bits)).sum(-1).astype(np.float64)
    scales, biases = (tensors[suffix].double().numpy()[..., None] for suffix in ("scales", "biases"))
    grouped = codes.reshape(*scales.shape[:2], -1)
    return torch.from_numpy((grouped * scales + biases).reshape(codes.shape))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    sym=st.booleans(),
    group_size=st.sampled_from([32, 64, 128, -1, 0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_packing_loses_nothing_but_the_scales_digits(bits, sym, group_size, dtype, seed):
    if bits == 8 and not sym and dtype == torch.bfloat16:
        return
    fmt, layer, tensor = packed_layer("W4A16", dtype, seed=seed, bits=bits, sym=sym, group_size=group_size)
    packed = fmt.pack(tensor, layer.info)
    assert {k: (tuple(v.shape), v.dtype) for k, v in packed.items()} == {
        k: (tuple(v.shape), v.dtype) for k, v in fmt.layout(layer).items()
    }
    rounded = dataclasses.replace(tensor.per_row(), scale=tensor.per_row().scale.to(dtype).half())
    back = fmt.unpack(packed, layer)
    assert torch.equal(back.codes, tensor.codes) and torch.equal(back.scale, rounded.scale)
    assert back.zero_point is None if sym else torch.equal(back.zero_point, rounded.zero_point)
    read = mlx_dequantize(packed, bits)
    assert torch.equal(read.float(), fmt.as_read(tensor, layer.info))
    if sym or dtype == torch.float32:
        assert torch.equal(read.float(), rounded.dequantize())
    else:
        step = rounded.scale.float().abs().max()
        digits = {torch.float16: 11, torch.bfloat16: 8}[dtype]
        assert (read - rounded.dequantize()).abs().max() <= step * 2.0 ** (bits - digits)


def test_biases_beyond_float16_are_refused():
    fmt, layer, tensor = packed_layer("W8A16", torch.float16)
    huge = dataclasses.replace(tensor, scale=torch.full_like(tensor.scale, 600.0))
    with pytest.raises(ValueError, match=r"up_proj: a scale or bias is too large for float16"):
        fmt.pack(huge, layer.info)
    with pytest.raises(ValueError, match="do not fit the layer"):
        fmt.pack(tensor, dataclasses.replace(layer.info, in_features=64))


def test_config_names_what_differs_and_what_is_kept():
    plan = make(
        "W4A16G32",
        ("q_proj", "k_proj", "up_proj", "down_proj"),
        layer_config={"down_proj": {"bits": 8, "group_size": 64}},
        ignore_layers=["k_proj"],
        beside={"model.embed_tokens": "an embedding"},
    )
    assert make_format("mlx", plan).config({"iters": 7}) == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": False,
        "model.layers.0.mlp.k_proj": False,
        "lm_head": False,
        "model.layers.0.mlp.down_proj": {"group_size": 64, "bits": 8},
    }


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("MXFP4", {}, r"up_proj: .*data_type 'mx_fp'.*use a scheme such as W4A16G64"),
        ("INT8", {}, r"act_bits 8"),
        ("W7A16", {}, r"no 7-bit kernels; use 6 or 8"),
        ({"group_size": 16}, {}, r"group size of 16, and the layer has 64 inputs; use 64 or 32"),
        ({"group_size": -1}, {"inputs": 96}, r"group size of 96, and the layer has 96 inputs; use 32"),
        ({"bits": 8, "sym": False}, {}, r"too coarse.*use sym=True, or 6 bits"),
        ("W4A16G32", {"info": {"transposed": True}}, r"Conv1D.*use auto_round"),
        ("W4A16G32", {"ignore_layers": ["mlp"]}, r"quantizes no layer"),
    ],
)
def test_refusals_name_layer_and_remedy(scheme, options, message):
    with pytest.raises(PlanError, match=message):
        make_format("mlx", make(scheme, **options))


EXPERTS = tuple(f"experts.{n}.up_proj" for n in range(2))


def of_type(kind, **options):
    return dataclasses.replace(make(**options), config=SimpleNamespace(model_type=kind))


def test_experts_need_one_scheme_and_a_loader_that_takes_them():
    fmt = make_format("mlx", make(names=EXPERTS))
    fmt.adapt_config({"model_type": "qwen2_moe"})
    with pytest.raises(PlanError, match=r"stacks experts of dbrx models only as floats.*ignore_layers"):
        fmt.adapt_config({"model_type": "dbrx"})
    with pytest.raises(PlanError, match=r"'qwen3_moe', and the plan was made for a None model"):
        fmt.adapt_config({"model_type": "qwen3_moe"})
    with pytest.raises(PlanError, match=r"one tensor of the experts.*experts\.1\.up_proj has another scheme"):
        make_format("mlx", make(names=EXPERTS, layer_config={"experts.1": {"bits": 8}}))
    with pytest.raises(PlanError, match="one tensor of the experts"):
        make_format("mlx", make(names=EXPERTS, ignore_layers=["experts.1"]))
    make_format("mlx", make(names=(*EXPERTS, "gate"), ignore_layers=["experts"])).adapt_config(LLAMA)
    with pytest.raises(PlanError, match=r"experts\.0\.up_proj has no place: use another format"):  # it was fused
        make_format("mlx", of_type("dbrx", names=(*EXPERTS, "gate"), ignore_layers=["experts"], info={"fused": True}))


def test_experts_are_stacked_where_mlx_lm_does_not_do_it():
    names = (*EXPERTS, "experts.0.down_proj", "experts.1.down_proj", "o_proj")
    plan = of_type("qwen3_moe", names=names, layer_config={"down_proj": {"bits": 8}}, ignore_layers=["up_proj"])
    fmt = make_format("mlx", plan)
    mlp = "model.layers.0.mlp"
    info = plan.layers[f"{mlp}.experts.1.up_proj"].info
    assert fmt.place(info, "weight") == Place(f"{mlp}.switch_mlp.up_proj.weight", 1, 2)  # kept, and stacked as well
    part = TensorShape((32, 64), torch.bfloat16)
    assert fmt.place(info, "weight").shape(part) == TensorShape((2, 32, 64), torch.bfloat16)
    other = fmt.place(plan.layers[f"{mlp}.o_proj"].info, "scales")
    assert other == Place(f"{mlp}.o_proj.scales") and other.shape(part) == part
    assert fmt.config({}) == {
        "group_size": 32,
        "bits": 8,
        f"{mlp}.switch_mlp.up_proj": False,
        "lm_head": False,
        f"{mlp}.o_proj": {"group_size": 32, "bits": 4},
    }
    assert make_format("mlx", of_type("qwen2_moe", names=names)).place(info, "weight") is None
    next_one = make_format("mlx", of_type("qwen3_next", names=names))
    assert next_one.place(info, "weight") is None  # found one by one, they make its loader adapt the norms too
    assert next_one.place(info, "scales") == Place(f"{mlp}.switch_mlp.up_proj.scales", 1, 2)


@given(
    kind=st.sampled_from(sorted(EXPERT_NAMES)),
    layer=st.sampled_from(["gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"]),
    before=st.sampled_from(["model.layers.3.mlp", "backbone.layers.0.mixer", "model.layers.1.feed_forward"]),
    index=st.integers(0, 5),
)
def test_names_are_found_back(kind, layer, before, index):
    names = EXPERT_NAMES[kind]
    if layer in set(names.layers.values()) - names.layers.keys():
        return  # not what this type calls its layers
    for stem in (f"{before}.experts.{index}.{layer}", f"{before}.{layer}", f"{before}.shared_experts.{layer}"):
        stored, found = names.place(stem)
        assert (stem, found) in names.sources(stored, 6)


def test_models_that_mlx_lm_does_not_load_are_named():
    fmt = make_format("mlx", make())
    with pytest.raises(PlanError, match="does not load models of type 't5'"):  # known before any work
        make_format("mlx", dataclasses.replace(make(), config=SimpleNamespace(model_type="t5")))
    for unknown, hint in (("t5", ""), ("llama5", "llama")):
        with pytest.raises(PlanError, match=rf"does not load models of type '{unknown}'.*{hint}"):
            fmt.adapt_config({"model_type": unknown})
    latent = make_format("mlx", make(names=("kv_b_proj", "up_proj")))
    latent.adapt_config({"model_type": "deepseek_v2"})
    with pytest.raises(PlanError, match=r"round it a second time: keep it with ignore_layers='kv_b_proj'"):
        latent.adapt_config({"model_type": "deepseek_v3"})
    assert STACKS_EXPERTS | REPACKS_KV_B | EXPERT_NAMES.keys() <= MODEL_TYPES
    assert not STACKS_EXPERTS & EXPERT_NAMES.keys()


def test_config_for_mlx_lm():
    fmt = make_format("mlx", make())
    adapted = fmt.adapt_config({**LLAMA, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert adapted["quantization"] == fmt.config({})
    assert adapted["tie_word_embeddings"] is False  # mlx-lm would take True for granted
    assert adapted["rope_theta"] == 5e5 and adapted["rope_scaling"] is None
    assert fmt.adapt_config({**LLAMA, "tie_word_embeddings": True})["tie_word_embeddings"] is True


def test_fields_that_mlx_lm_misses_are_added():
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "num_local_experts": 8}
    layers = ["linear_attention", "linear_attention", "full_attention"] * 2
    adapted = make_format("mlx", make()).adapt_config({**LLAMA, **sizes, "layer_types": layers})
    assert (adapted["num_experts"], adapted["head_dim"], adapted["full_attention_interval"]) == (8, 24, 3)
    config = SimpleNamespace(model_type="llama", head_dim=32)
    own = make_format("mlx", dataclasses.replace(make(), config=config))
    assert own.adapt_config({**LLAMA, **sizes})["head_dim"] == 32  # what Transformers takes it to be
    uneven = with_known_fields({"layer_types": ["full_attention", "linear_attention"]})
    assert "full_attention_interval" not in uneven


def test_rope_fields_stand_where_they_stood():
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    found = with_known_fields({"text_config": {"rope_parameters": llama3}, "rope_parameters": None})
    assert found["rope_parameters"] is None
    inside = found["text_config"]
    assert inside["rope_theta"] == 5e5 and inside["rope_parameters"] == llama3
    assert inside["rope_scaling"] == {"type": "llama3", **llama3}
    both = with_known_fields(
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        }
    )
    assert (both["rope_theta"], both["rope_local_base_freq"], both["rope_scaling"]["factor"]) == (1e6, 1e4, 8.0)
    partial = with_known_fields(
        {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    )
    assert partial["rope_theta"] == 7.0  # what the config says itself is left alone
    assert partial["partial_rotary_factor"] == partial["rotary_pct"] == 0.5


# ---- the independent reader --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder with one packed layer, and what was packed."""
    fmt, layer, tensor = packed_layer("W3A16G32", torch.bfloat16, sym=False)
    stored = {f"{layer.name}.{suffix}": value for suffix, value in fmt.pack(tensor, layer.info).items()}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": fmt.config({})}))
    return tmp_path, fmt, layer, tensor


def test_reader_reads_what_was_written(folder):
    path, fmt, layer, tensor = folder
    checkpoint, quantization = Checkpoint(path), fmt.config({})
    quantization.pop("model.layers.0.mlp.down_proj", None)
    assert (
        is_mlx(quantization) and not is_mlx({"quant_method": "gptq", "bits": 4, "group_size": 32}) and not is_mlx(None)
    )
    assert mlx_layers(checkpoint) == [layer.name]
    assert mlx_problem(checkpoint, quantization) is None
    assert torch.equal(read_mlx(checkpoint, quantization, layer.name), fmt.as_read(tensor, layer.info))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 4}, "shapes that 4 bits"),
        ({"group_size": 64}, "shapes that 3 bits"),
        ({"model.layers.0.mlp.up_proj": False}, "says that it is not"),
        ({"model.layers.0.mlp.other": {"bits": 3, "group_size": 32}}, "other has an entry"),
    ],
)
def test_reader_names_what_does_not_agree(folder, change, message):
    path, fmt, *_ = folder
    assert message in mlx_problem(Checkpoint(path), {**fmt.config({}), **change})


def test_reader_misses_tensors(folder):
    path, fmt, layer, tensor = folder
    packed = fmt.pack(tensor, layer.info)
    save_file({f"{layer.name}.{s}": packed[s] for s in ("weight", "scales")}, path / "model.safetensors")
    assert mlx_problem(Checkpoint(path), fmt.config({})) == f"{layer.name} has no biases"
    with pytest.raises(CheckpointError, match="not"):
        read_mlx(Checkpoint(path), {**fmt.config({}), layer.name: False}, layer.name)


@pytest.fixture
def stacked(tmp_path):
    """A folder with two experts in stacked tensors, and what was packed."""
    plan = of_type("gpt_oss", names=EXPERTS, inputs=128)
    fmt = make_format("mlx", plan)
    tensors, stacks = {}, {}
    for seed, (name, layer) in enumerate(plan.quantized().items()):
        weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(seed))
        tensors[name] = quantize(WeightTask(weight, layer.scheme.weight))
        for suffix, value in {**fmt.pack(tensors[name], layer.info), "bias": weight[:, 0]}.items():
            stacks.setdefault(fmt.place(layer.info, suffix).name, []).append(value)
    save_file({name: torch.stack(parts) for name, parts in stacks.items()}, tmp_path / "model.safetensors")
    return tmp_path, fmt, plan, tensors


def test_reader_reads_experts_out_of_stacks(stacked):
    folder, fmt, plan, tensors = stacked
    checkpoint, quantization = open_mlx(folder, "gpt_oss"), fmt.config({})
    assert mlx_layers(checkpoint) == sorted(tensors) and mlx_problem(checkpoint, quantization) is None
    for name, tensor in tensors.items():
        assert torch.equal(read_mlx(checkpoint, quantization, name), fmt.as_read(tensor, plan.layers[name].info))
        assert checkpoint.read_one(f"{name}.bias").shape == checkpoint.entries[f"{name}.bias"].shape == (32,)
    stem = "model.layers.0.mlp.experts.up_proj"
    assert "shapes that 8 bits" in mlx_problem(checkpoint, {**quantization, stem: {"bits": 8, "group_size": 32}})
    assert mlx_problem(checkpoint, {**quantization, stem: {"bits": 4, "group_size": 32}}) is None
    assert mlx_problem(checkpoint, {**quantization, stem: False}).endswith("says that it is not")


def test_an_expert_that_is_there_twice(stacked):
    folder, *_ = stacked
    save_file({f"model.layers.0.mlp.{EXPERTS[0]}.bias": torch.zeros(32)}, folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.0\.up_proj\.bias' is there twice"):
        UnstackedCheckpoint(folder, EXPERT_NAMES["gpt_oss"])
