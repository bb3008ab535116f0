"""Engine profiles: what runs as one, which format an engine loads, what it could not load, and the repair."""

import dataclasses

import pytest

from auto_round.formats import FORMATS, format_name, make_format
from auto_round.formats.engines import (
    ENGINES,
    engine,
    expert_roles,
    fused_groups,
    merged_groups,
    warnings_for_mixed,
)
from auto_round.formats.mlx import GROUP_SIZES, WIDTHS
from auto_round.plan import LayerInfo, PlanError, make_plan
from auto_round.schemes import PRESET_SCHEMES, parse_scheme

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = tuple(f"mlp.experts.{n}.{part}" for n in range(2) for part in ("gate_proj", "up_proj", "down_proj"))


def plan_of(scheme="W4A16G32", parts=(*ATTENTION, *MLP), blocks=2, inputs=None, **rules):
    names = [f"model.layers.{n}" for n in range(blocks)]
    infos = [LayerInfo(f"{n}.{p}", 128, (inputs or {}).get(p.rpartition(".")[2], 256), n) for n in names for p in parts]
    infos.append(LayerInfo("lm_head", 96, 256, None))
    return make_plan(infos, [names], parse_scheme(scheme), **rules)


def schemes(plan, part):
    return {layer.scheme for layer in plan.layers.values() if part in layer.name}


def test_groups():
    names = [*ATTENTION, *MLP, *EXPERTS, "mlp.shared_experts.up_proj", "mlp.gate", "lm_head"]
    merged = [list(ATTENTION[:3]), list(MLP[:2])]
    assert fused_groups(names) == [*merged, list(EXPERTS)]
    assert merged_groups(names) == [*merged, [EXPERTS[0], EXPERTS[1]], [EXPERTS[3], EXPERTS[4]]]
    assert expert_roles(names) == [[EXPERTS[0], EXPERTS[3]], [EXPERTS[1], EXPERTS[4]], [EXPERTS[2], EXPERTS[5]]]
    moe = [f"layers.0.block_sparse_moe.experts.{n}.{part}" for n in (0, 11) for part in ("w1", "w2", "w3")]
    assert fused_groups(moe) == [moe]
    assert merged_groups(moe) == [[moe[0], moe[2]], [moe[3], moe[5]]]
    assert fused_groups(["a.q_proj", "b.k_proj", "experts.expert_3.wi", "x.experts"]) == []
    assert fused_groups(["a.in_proj_z", "a.in_proj_qkv", "a.in_proj_a"]) == [["a.in_proj_z", "a.in_proj_qkv"]]


@pytest.mark.parametrize(
    ("name", "scheme", "expected"),
    [
        ("vllm", "W4A16", "auto_round"),
        ("vllm", "W8A16G32", "auto_round"),
        ("vllm", "W3A16", "auto_round"),
        ("vllm", {"sym": False}, "auto_round:auto_awq"),
        ("vllm", {"bits": 8, "sym": False}, "llm_compressor"),
        ("sglang", "W4A16", "auto_round"),
        ("sglang", {"sym": False}, "auto_round:auto_awq"),
        ("transformers", {"bits": 3, "sym": False, "group_size": 48}, "auto_round"),
        ("transformers", "MXINT4", "auto_round"),
        ("llama.cpp", "GGUF:Q4_K_S", "gguf:q4_k_m"),
        ("llama.cpp", "GGUF:Q2_K_S", "gguf:q2_k_s"),
        ("llama.cpp", "GGUF:Q6_K", "gguf:q6_k"),
        ("llama.cpp", "GGUF:Q5_1", "gguf:q5_1"),
        ("llama.cpp", "W4A16G32", "gguf:q4_0"),
        ("mlx", "W6A16G64", "mlx"),
        *(
            (name, scheme, "llm_compressor")
            for name in ("vllm", "sglang", "transformers")
            for scheme in ("MXFP4", "MXFP8", "NVFP4", "FP8_STATIC", "FP8_BLOCK", "FPW8A16", "INT8", "MXFP4_RCEIL")
        ),
    ],
)
def test_format_of_a_scheme(name, scheme, expected):
    assert engine(name).choose_format(parse_scheme(scheme)) == expected


@pytest.mark.parametrize(
    ("name", "scheme", "message"),
    [
        (
            "vllm",
            {"group_size": 16},
            r"vLLM does not load 4-bit int, sym, groups of 16: .*group size of 128, 64, 32 or -1",
        ),
        ("vllm", "MXINT4", r"would with"),
        ("sglang", "W5A16", r"would with 4 or 8 bits"),
        ("sglang", {"bits": 8, "sym": False}, r"would with sym=True"),
        ("llama.cpp", "W4A16", r"loads GGUF only; use the scheme GGUF:Q4_K_M"),
        ("llama.cpp", "MXFP8", r"GGUF:Q8_0"),
        ("mlx", "W7A16", r"mlx-lm does not load 7-bit"),
        ("mlx", "NVFP4", r"would with data_type 'int'"),
    ],
)
def test_no_format_for_a_scheme(name, scheme, message):
    with pytest.raises(PlanError, match=message):
        engine(name).choose_format(parse_scheme(scheme))


def test_every_format_named_exists():
    for profile in ENGINES.values():
        for scheme in PRESET_SCHEMES.values():
            try:
                chosen = profile.choose_format(scheme)
            except PlanError:
                continue
            assert format_name(chosen) == chosen
        assert set(profile.plain) <= FORMATS.keys()


def test_names_of_engines():
    assert engine("vLLM").name == "vllm" and engine("llama_cpp").name == "llama.cpp" and engine("MLX-LM").name == "mlx"
    with pytest.raises(PlanError, match=r"unknown engine 'vlm'; did you mean 'vllm'\?; known: vllm, sglang"):
        engine("vlm")


def test_uniform_plans_are_loaded():
    for scheme, fmt in (("W4A16G32", "auto_round"), ("W4A16G32", "auto_gptq"), ("W4A16G32", "llm_compressor")):
        assert engine("vllm").problems(plan_of(scheme), fmt) == []
    assert engine("vllm").problems(plan_of({"group_size": 32, "sym": False}), "auto_round") == []
    assert engine("transformers").problems(plan_of({"bits": 3, "sym": False}), "auto_round") == []
    assert engine("vllm").problems(plan_of("W3A16", layer_config={"v_proj": {"bits": 8}}), "fake") == []
    assert engine("mlx").problems(plan_of("W4A16"), "mlx") == []
    assert warnings_for_mixed(plan_of()) == []


def test_problems_name_layers_and_remedies():
    vllm = engine("vllm")
    (packing,) = vllm.problems(plan_of({"bits": 3, "sym": False}), "auto_round")
    assert "does not read the packing auto_round " in packing and "use the format llm_compressor" in packing
    (groups,) = vllm.problems(plan_of({"group_size": 16}), "auto_round")
    assert "groups of 16 from auto_round" in groups and "q_proj" in groups and "12 more" in groups
    assert "a group size of 128, 64, 32 or -1" in groups
    (gptq,) = vllm.problems(plan_of("W3A16"), "auto_gptq")
    assert "use the format auto_round or llm_compressor" in gptq
    (refused,) = vllm.problems(plan_of("W3A16"), "auto_awq")
    assert "auto_awq cannot hold" in refused
    (gguf,) = engine("llama.cpp").problems(plan_of(), "auto_round")
    assert "llama.cpp does not load" in gguf and gguf.endswith("use the format gguf:q4_0")
    (gguf,) = engine("llama.cpp").problems(plan_of("W3A16"), "auto_round")
    assert "use the scheme GGUF:Q3_K_M" in gguf


def test_mixed_parts_of_one_layer_are_a_problem_once():
    mixed = plan_of(layer_config={"v_proj": {"bits": 8}, "up_proj": {"bits": 8}})
    first, second = engine("vllm").problems(mixed, "auto_round")
    assert "q_proj, k_proj, v_proj as one" in first and "model.layers.0.self_attn, model.layers.1.self_attn" in first
    assert "gate_proj, up_proj as one" in second and "v_proj: 8-bit" in first
    assert engine("transformers").problems(mixed, "auto_round") == []
    assert all("--for vllm" in warning for warning in warnings_for_mixed(mixed)) and len(warnings_for_mixed(mixed)) == 2


def test_repair_raises_to_the_most_precise():
    mixed = plan_of(layer_config={"v_proj": {"bits": 8, "group_size": 64}, "layers.1.mlp.up_proj": {"bits": 2}})
    repaired, messages = engine("vllm").repair(mixed)
    assert {(s.bits, s.group_size) for part in ("q_proj", "k_proj", "v_proj") for s in schemes(repaired, part)} == {
        (8, 32)
    }
    assert schemes(repaired, "up_proj") == schemes(repaired, "o_proj") == {mixed.scheme}
    assert len(messages) == 2 and "q_proj, k_proj, v_proj as one, so all get 8-bit" in messages[0]
    assert "model.layers.1.mlp" in messages[1]
    assert "runs it as one with" in repaired.layers["model.layers.0.self_attn.q_proj"].reason
    assert engine("vllm").problems(repaired, "auto_round") == [] and engine("vllm").repair(repaired) == (repaired, [])
    assert mixed.layers["model.layers.0.self_attn.q_proj"].scheme.bits == 4
    assert engine("transformers").repair(mixed) == (mixed, [])


def test_repair_keeps_all_where_one_is_kept():
    repaired, messages = engine("sglang").repair(plan_of(ignore_layers=["layers.0.self_attn.k_proj"]))
    assert [n.rpartition(".")[2] for n in repaired.kept()] == ["q_proj", "k_proj", "v_proj", "lm_head"]
    assert "all are kept, as model.layers.0.self_attn.k_proj is (ignore_layers" in messages[0]


def test_repair_finds_a_group_size_for_all_experts():
    """A row of 96 inputs and groups of 64 have 32 in common; scales per row of equal length need none."""
    experts = plan_of("W4A16G64", EXPERTS, inputs={"down_proj": 96})
    assert {s.group_size for s in schemes(experts, "down_proj")} == {48}
    repaired, _ = engine("vllm").repair(experts)
    assert {s.group_size for s in schemes(repaired, "experts")} == {16}
    small = plan_of("W4A16", EXPERTS, inputs={"down_proj": 128})
    assert {s.group_size for s in schemes(small, "experts")} == {128, -1}
    repaired, _ = engine("vllm").repair(small)
    assert {s.group_size for s in schemes(repaired, "experts")} == {128}
    assert engine("vllm").problems(repaired, "auto_round") == []
    per_row = plan_of({"group_size": -1}, EXPERTS, inputs={"down_proj": 96})
    assert engine("vllm").repair(per_row) == (per_row, [])


def test_experts_stacked_by_role_may_differ_between_roles():
    plan = plan_of(parts=EXPERTS, layer_config={"down_proj": {"bits": 8}})
    assert engine("mlx").repair(plan) == (plan, [])
    uneven = plan_of(parts=EXPERTS, layer_config={"experts.1.down_proj": {"bits": 8}})
    repaired, _ = engine("mlx").repair(uneven)
    assert {s.bits for s in schemes(repaired, "down_proj")} == {8}
    assert {s.bits for s in schemes(repaired, "up_proj")} == {4}


def test_profile_of_mlx_is_the_formats():
    for bits in WIDTHS:
        for size in GROUP_SIZES:
            plan = plan_of({"bits": bits, "group_size": size}, ATTENTION)
            assert engine("mlx").choose_format(plan.scheme) == make_format("mlx", plan).name
    coarse = plan_of({"bits": 8, "sym": False, "group_size": 32})
    assert "too coarse" in engine("mlx").problems(coarse, "mlx")[0]


def test_plans_are_not_changed():
    plan = plan_of(layer_config={"v_proj": {"bits": 8}})
    before = dataclasses.replace(plan, layers=dict(plan.layers))
    engine("vllm").repair(plan)
    assert plan == before
