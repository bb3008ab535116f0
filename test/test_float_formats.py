"""Small floats, INT8 and quantized inputs in files: layouts, and each format opened by the client that reads it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import tiny, tiny_llama, token_ids
from transformers import AutoModelForCausalLM, AutoRoundConfig

from auto_round.data_type import data_type
from auto_round.data_type.base import QuantizedTensor, WeightTask
from auto_round.formats import make_format
from auto_round.formats.float_layouts import (
    auto_round_layout,
    float_packing,
    offset_to_sign,
    pack_pairs,
    sign_to_offset,
    unpack_pairs,
)
from auto_round.modeling.checkpoint import CheckpointError
from auto_round.plan import LayerInfo, ModelPlan, PlanError, make_plan
from auto_round.schemes import parse_scheme
from auto_round.verify.artifact import Artifact, layout_problem
from auto_round.verify.finished import verify_artifact
from auto_round.verify.packed import reader_rounds_inputs, small_floats
from auto_round.verify.values import codes_problem
from auto_round.wrapper import quantized_inputs

SCHEMES = (
    "INT8",
    "FP8_STATIC",
    "FP8_BLOCK",
    "FPW8A16",
    "MXFP4",
    "MXFP8",
    "MXFP4_RCEIL",
    "MXFP8_RCEIL",
    "NVFP4",
    "MXINT4",
)
COMPRESSED = SCHEMES[:-1]
DOWN = "model.layers.0.mlp.down_proj"
SIZE = {"hidden_size": 128, "intermediate_size": 256}
IDS = torch.cat(token_ids(2, 16))


# ---- writing a folder, without the tuning -------------------------------------------------------------------------


@dataclass
class Export:
    """A written folder and what must come back from it. model: the original, with the quantized weights in it."""

    folder: Path
    model: Any
    plan: ModelPlan
    tensors: dict[str, QuantizedTensor]

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())["quantization_config"]

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """What a reader must compute that rounds inputs where Transformers does."""
        rounded = {n: p for n, p in self.plan.quantized().items() if reader_rounds_inputs(self.config, n)}
        with quantized_inputs(self.model, rounded, {n: t.input_scale for n, t in self.tensors.items()}):
            return self.model(IDS).logits

    def read(self, **options: Any) -> torch.Tensor:
        """Logits of Transformers; every tensor of the file must have been used, but scales of inputs left alone."""
        loaded, info = AutoModelForCausalLM.from_pretrained(self.folder, output_loading_info=True, **options)
        unused = info.pop("unexpected_keys")
        assert not any(info.values()), info
        assert not unused or ("dequantize" in self.config and all("input_global_scale" in name for name in unused))
        with torch.no_grad():
            return loaded(IDS).logits


def layer_infos(model: Any) -> list[LayerInfo]:
    return [
        LayerInfo(
            name,
            *module.weight.shape,
            ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else None,
            dtype=module.weight.dtype,
            role="router" if name.endswith(".gate") else "",
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]


def plan_of(model: Any, scheme: Any, rules: Any = None, **options: Any) -> ModelPlan:
    blocks = [[f"model.layers.{index}" for index in range(len(model.model.layers))]]
    return make_plan(layer_infos(model), blocks, parse_scheme(scheme), rules, lm_head="lm_head", **options)


def quantized(weight: torch.Tensor, scheme: Any) -> QuantizedTensor:
    tensor = data_type(scheme.data_type).quantize(WeightTask(weight.clone(), scheme.weight))
    if scheme.needs_input_range:
        scale = data_type(scheme.act.data_type).input_scale(torch.tensor(2.5), scheme.act)
        tensor = dataclasses.replace(tensor, input_scale=scale)
    return tensor


@torch.no_grad()
def export(model: Any, scheme: Any, fmt: str, folder: Path, rules: Any = None, **options: Any) -> Export:
    plan = plan_of(model, scheme, rules, **options)
    writer = make_format(fmt, plan)
    stored, tensors = dict(model.state_dict()), {}
    for name, layer in plan.quantized().items():
        tensor = tensors[name] = quantized(stored.pop(f"{name}.weight"), layer.scheme)
        model.get_submodule(name).weight.copy_(tensor.dequantize())
        packed = writer.pack(tensor, layer.info)
        announced = {key: (tuple(part.shape), part.dtype) for key, part in writer.layout(layer).items()}
        assert {key: (tuple(part.shape), part.dtype) for key, part in packed.items()} == announced
        stored |= {f"{name}.{key}": part for key, part in packed.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__], "quantization_config": writer.config({"iters": 0})}
    (folder / "config.json").write_text(json.dumps(config))
    return Export(folder, model, plan, tensors)


def llama(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    return tiny_llama(dtype, **{**SIZE, **changes})


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def damaged(made: Export, edit: Any) -> Export:
    tensors, config = (
        load_file(made.folder / "model.safetensors"),
        json.loads((made.folder / "config.json").read_text()),
    )
    edit(tensors, config["quantization_config"])
    save_file(tensors, made.folder / "model.safetensors", {"format": "pt"})
    (made.folder / "config.json").write_text(json.dumps(config))
    return made


# ---- layouts ------------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 9), pairs=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_pairs_of_codes(rows: int, pairs: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 16, (rows, 2 * pairs), dtype=np.uint8))
    octets = pack_pairs(codes)
    assert torch.equal(octets, codes[:, ::2] + 16 * codes[:, 1::2])
    assert torch.equal(unpack_pairs(octets), codes)


def test_signs_of_mxint4() -> None:
    codes = torch.cartesian_prod(*[torch.arange(1, 16, dtype=torch.uint8)] * 2)
    signed = unpack_pairs(offset_to_sign(pack_pairs(codes))).int()
    assert torch.equal(signed % 8 * (1 - 2 * (signed // 8)), codes.int() - 8)
    assert torch.equal(sign_to_offset(offset_to_sign(pack_pairs(codes))), pack_pairs(codes))
    assert sign_to_offset(torch.tensor([0x80, 0x08], dtype=torch.uint8)).tolist() == [0x88, 0x88]  # minus zero


@given(
    scheme=st.sampled_from(SCHEMES),
    rows=st.sampled_from((16, 96, 160)),
    columns=st.sampled_from((32, 128, 320)),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_layouts_lose_nothing(scheme: str, rows: int, columns: int, seed: int) -> None:
    """Also random bytes, as far as a family has them, not only what rounding gives."""
    wanted = parse_scheme(scheme)
    generator = torch.Generator().manual_seed(seed)
    tensor = quantized(torch.randn(rows, columns, generator=generator), wanted)
    low, high = (1, 16) if wanted.data_type == "mx_int" else (0, 1 << wanted.bits)
    codes = torch.randint(low, high, (rows, columns), generator=generator).to(torch.uint8)
    tensor = dataclasses.replace(tensor, codes=codes)
    layout = auto_round_layout(float_packing(wanted), wanted)
    back = layout.unpack(layout.pack(tensor, wanted, "layer"), wanted)
    assert torch.equal(back.codes, codes)
    assert torch.equal(back.dequantize().nan_to_num(0.5), tensor.dequantize().nan_to_num(0.5))
    assert (back.input_scale is None) == (tensor.input_scale is None)
    assert tensor.input_scale is None or torch.equal(back.input_scale, tensor.input_scale)


def test_small_floats_are_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(small_floats(4, 3), codes, equal_nan=True)
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert small_floats(2, 1).tolist() == [*positive, *(-value for value in positive)]


def test_a_missing_input_scale_is_named() -> None:
    scheme = parse_scheme("FP8_STATIC")
    tensor = dataclasses.replace(quantized(torch.randn(32, 32), scheme), input_scale=None)
    with pytest.raises(ValueError, match=r"some\.layer has no scale for its inputs"):
        auto_round_layout(float_packing(scheme), scheme).pack(tensor, scheme, "some.layer")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scheme": "INT8", "sym": False}, "asymmetric 'int' weights"),
        ({"scheme": "INT8", "group_size": 32}, "in groups of 32"),
        ({"scheme": "INT8", "act_dynamic": False}, "only float8 inputs"),
        ({"scheme": "FP8_BLOCK", "act_dynamic": False}, "with a fixed scale"),
        ({"scheme": "FPW8A16", "group_size": 64}, "in groups of 64"),
        ({"scheme": "FP8_STATIC", "act_group_size": 128}, "only float8 inputs"),
        ({"scheme": "MXFP4", "act_data_type": "int", "act_bits": 8}, "use mx_fp or mx_fp_rceil"),
        ({"scheme": "GGUF:Q4_K_M"}, "'int_asym_dq' weights"),
    ],
)
def test_schemes_without_a_layout(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        float_packing(parse_scheme(changes))


# ---- compressed-tensors -------------------------------------------------------------------------------------------


def client_weights(made: Export) -> dict[str, torch.Tensor]:
    """Layer → weight, by compressed-tensors: its schema finds the scheme, its decompressor the values."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_targets

    schema = QuantizationConfig.model_validate({k: v for k, v in made.config.items() if k != "dequantize"})
    groups = {target: group for group in schema.config_groups.values() for target in group.targets}
    stored, weights = load_file(made.folder / "model.safetensors"), {}
    for layer in made.tensors:
        own = {key[len(layer) + 1 :]: value for key, value in stored.items() if key.startswith(f"{layer}.")}
        group = groups[match_targets(layer, torch.nn.Linear(1, 1), groups)[0]]
        assert infer_module_format(torch.nn.Linear, group) == group.format
        weights[layer] = BaseCompressor.get_value_from_registry(group.format).decompress(own, group)["weight"]
    return weights


TOLERANCE = {"INT8": 0.05, "FP8_STATIC": 0.1, "FP8_BLOCK": 0.1, "FPW8A16": 0, "NVFP4": 0.3, "MXFP4": 0, "MXFP8": 0}
"""How far Transformers' logits may be from ours: it rounds inputs and NVFP4 weights in bfloat16, which tiny random
models amplify; a wrong layout is beyond 1."""


@pytest.mark.parametrize("scheme", COMPRESSED)
def test_compressed_tensors_reads_our_weights(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    made = export(llama(), scheme, "llm_compressor", tmp_path)
    for layer, weight in client_weights(made).items():
        exact = made.tensors[layer].dequantize()
        if scheme == "NVFP4":  # it divides scales in bfloat16
            assert error(weight, exact) < 4e-3
        else:
            assert torch.equal(weight, exact.to(weight.dtype))
            assert scheme.startswith("MX") or weight.dtype == torch.float32
    assert made.config["ignore"] == ["lm_head"]
    if not scheme.endswith("_RCEIL"):
        got = made.read()
        assert got.isfinite().all() and error(got, made.logits()) <= TOLERANCE[scheme]


def test_config_of_each_scheme() -> None:
    facts = {}
    for scheme in COMPRESSED:
        config = make_format("llm_compressor", plan_of(llama(), scheme)).config({})
        group = config["config_groups"]["group_0"]
        inputs = group["input_activations"] or {}
        facts[scheme] = (
            config["format"],
            *(group["weights"]["strategy"], inputs.get("strategy"), inputs.get("dynamic")),
        )
        assert config["format"] == group["format"] and ("dequantize" in config) == (scheme == "FPW8A16")
    assert facts == {
        "INT8": ("int-quantized", "channel", "token", True),
        "FP8_STATIC": ("float-quantized", "channel", "tensor", False),
        "FP8_BLOCK": ("float-quantized", "block", "group", True),
        "FPW8A16": ("naive-quantized", "tensor", None, None),
        "MXFP4": ("mxfp4-pack-quantized", "group", "group", True),
        "MXFP8": ("mxfp8-quantized", "group", "group", True),
        "MXFP4_RCEIL": ("mxfp4-pack-quantized", "group", "group", True),
        "MXFP8_RCEIL": ("mxfp8-quantized", "group", "group", True),
        "NVFP4": ("nvfp4-pack-quantized", "tensor_group", "tensor_group", "local"),
    }


MIXED = {
    "self_attn": {"scheme": "FP8_STATIC"},
    "o_proj": {"scheme": "W4A16G32"},
    "down_proj": {"scheme": "MXFP8"},
    "layers.1.mlp.up_proj": {"bits": 16},
}


def test_mixed_schemes(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    made = export(llama(), "MXFP4", "llm_compressor", tmp_path, MIXED)
    assert made.config["format"] == "mixed-precision" and len(made.config["config_groups"]) == 4
    assert set(made.config["ignore"]) == {"lm_head", "model.layers.1.mlp.up_proj"}
    weights = client_weights(made)
    assert all(torch.equal(weight, made.tensors[n].dequantize(weight.dtype)) for n, weight in weights.items())
    assert error(made.read(), made.logits()) < 0.2
    artifact = Artifact.open(tmp_path)
    assert all(torch.equal(artifact.weight(n), tensor.dequantize()) for n, tensor in made.tensors.items())


@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4"])
def test_models_that_are_not_bfloat16_are_dequantized(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    made = export(llama(torch.float16), scheme, "llm_compressor", tmp_path)
    assert made.config["dequantize"] is True
    assert error(made.read(), made.logits()) < 0.02
    with pytest.raises(PlanError, match="the model is in float16"):
        export(llama(torch.float16), scheme, "llm_compressor", tmp_path, {"down_proj": {"scheme": "MXFP8"}})


def mixtral() -> Any:
    return tiny("mixtral", dtype=torch.bfloat16, hidden_size=128, intermediate_size=128)


EXPERTS = [
    LayerInfo("model.layers.0.self_attn.q_proj", 128, 128, "model.layers.0"),
    *(LayerInfo(f"model.layers.0.mlp.experts.{n}.up_proj", 128, 128, "model.layers.0") for n in range(2)),
]


@pytest.mark.parametrize("scheme", ["INT8", "FP8_BLOCK", "MXFP8", "NVFP4"])
def test_experts_that_transformers_would_load_wrongly_are_refused(scheme: str) -> None:
    with pytest.raises(PlanError, match="not experts in"):
        make_format("llm_compressor", make_plan(EXPERTS, [["model.layers.0"]], parse_scheme(scheme)))


def test_what_compressed_tensors_cannot_hold() -> None:
    def build(scheme: Any, **changes: Any) -> None:
        info = dataclasses.replace(EXPERTS[0], **changes)
        make_format("llm_compressor", make_plan([info], [["model.layers.0"]], parse_scheme(scheme)))

    with pytest.raises(PlanError, match="no MXINT4"):
        build("MXINT4")
    with pytest.raises(PlanError, match="whole blocks of inputs, and the 96"):
        build("FP8_BLOCK", in_features=96)
    with pytest.raises(PlanError, match="asymmetric 'int'"):
        build({"scheme": "INT8", "sym": False})
    with pytest.raises(PlanError, match="Conv1D"):
        build("INT8", transposed=True)


# ---- auto_round ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_auto_round_reads_itself(scheme: str, tmp_path: Path) -> None:
    made = export(llama(), scheme, "auto_round", tmp_path)
    assert torch.equal(made.read(), made.logits())
    assert verify_artifact(tmp_path).passed
    artifact = Artifact.open(tmp_path)
    assert artifact.packed_layers() and sorted(artifact.packed_layers()) == sorted(made.tensors)
    for layer, tensor in made.tensors.items():
        assert torch.equal(artifact.weight(layer), tensor.dequantize())
        scale = artifact.input_scale(layer)
        assert (scale is None) == (tensor.input_scale is None) and (
            scale is None or torch.equal(scale, tensor.input_scale)
        )


def test_packings_are_the_published_ones() -> None:
    names = {s: make_format("auto_round", plan_of(llama(), s)).config({})["packing_format"] for s in SCHEMES}
    assert names.pop("MXINT4") == "auto_round" and names.pop("INT8") == "auto_round:int8"
    assert names.pop("FP8_STATIC") == "auto_round:fp8_static"
    assert {names.pop("FP8_BLOCK"), names.pop("FPW8A16")} == {"auto_round:fp8"}
    assert set(names.values()) == {"auto_round:llm_compressor"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_accepts_the_configuration(scheme: str) -> None:
    config = make_format("auto_round", plan_of(llama(), scheme, MIXED)).config({})
    read = AutoRoundConfig.from_dict(json.loads(json.dumps(config)))
    assert read.bits == parse_scheme(scheme).bits and read.data_type == parse_scheme(scheme).data_type
    assert (getattr(read, "act_bits", None) is None) == (scheme == "FPW8A16")


@pytest.mark.parametrize("scheme", ["MXFP4", "FP8_BLOCK", "INT8", "W4A16G32"])
def test_auto_round_mixes_schemes(scheme: str, tmp_path: Path) -> None:
    rules = {**MIXED, "k_proj": {"scheme": "FP8_BLOCK"}, "gate_proj": {"scheme": "W8A16"}}
    made = export(llama(), scheme, "auto_round", tmp_path, rules, quant_lm_head=not scheme.startswith("W"))
    assert torch.equal(made.read(quantization_config=AutoRoundConfig(backend="torch")), made.logits())
    artifact = Artifact.open(tmp_path)
    assert all(torch.equal(artifact.weight(n), tensor.dequantize()) for n, tensor in made.tensors.items())
    assert layout_problem(artifact) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_and_names_of_backends(dtype: torch.dtype, tmp_path: Path) -> None:
    made = export(llama(dtype), "NVFP4", "auto_round", tmp_path)
    for backend in ("torch_float", "auto_round:torch_nvfp4", "torch"):
        assert torch.equal(made.read(quantization_config=AutoRoundConfig(backend=backend)), made.logits())


def test_experts_are_loaded_one_by_one(tmp_path: Path) -> None:
    from auto_round import AutoRound
    from auto_round.inference.backends.floats import FloatLinear

    mixtral().save_pretrained(tmp_path / "source")
    options = {"iters": 0, "disable_opt_rtn": True, "show_progress": False, "device_map": "cpu"}
    run = AutoRound(str(tmp_path / "source"), None, scheme="MXFP4", **options)
    _, folder = run.quantize_and_save(tmp_path / "out", format="auto_round")
    model = AutoModelForCausalLM.from_pretrained(folder)
    names = [name for name, module in model.named_modules() if isinstance(module, FloatLinear)]
    assert sum(".experts." in name for name in names) > 8 and not any(name.endswith(".gate") for name in names)
    assert model(IDS).logits.isfinite().all()


def drop(suffix: str) -> Any:
    return lambda tensors, config: tensors.pop(f"{DOWN}.{suffix}")


def reshape(suffix: str) -> Any:
    return lambda tensors, config: tensors.update({f"{DOWN}.{suffix}": tensors[f"{DOWN}.{suffix}"][:-1].clone()})


def not_finite(tensors: Any, config: Any) -> None:
    tensors[f"{DOWN}.weight_scale"][0] = torch.nan


@pytest.mark.parametrize(
    ("scheme", "edit", "match"),
    [
        ("FP8_STATIC", drop("input_scale"), "has no"),
        ("FP8_STATIC", not_finite, "NaN or Inf"),
        ("NVFP4", drop("weight_global_scale"), "has no"),
        ("MXFP4", drop("weight_packed"), "has no"),
        ("MXFP8", drop("weight_scale"), "has no"),
        ("INT8", reshape("weight"), "mismatch"),
    ],
)
def test_damage_is_found(scheme: str, edit: Any, match: str, tmp_path: Path) -> None:
    made = damaged(export(llama(), scheme, "auto_round", tmp_path), edit)
    with pytest.raises((ValueError, RuntimeError), match=match) as caught:
        made.read()
    assert DOWN in str(caught.value) or match == "mismatch"
    try:
        assert not verify_artifact(tmp_path).passed
    except CheckpointError as problem:
        assert DOWN in str(problem)


@pytest.mark.parametrize("fmt", ["auto_round", "llm_compressor"])
def test_other_codes_or_scales_are_found(fmt: str, tmp_path: Path) -> None:
    made = export(llama(), "FP8_STATIC", fmt, tmp_path)
    store = SimpleNamespace(load=lambda part, layers: SimpleNamespace(tensors={n: made.tensors[n] for n in layers}))

    def problem() -> str | None:
        return codes_problem(Artifact.open(tmp_path), made.plan, store, {n: n for n in made.tensors}, "model.layers.0")

    assert problem() is None
    damaged(made, lambda tensors, config: tensors[f"{DOWN}.input_scale"].mul_(2))
    assert "fixed scale of its inputs" in problem()
    damaged(made, lambda tensors, config: tensors[f"{DOWN}.weight"].view(torch.uint8)[3, 5].add_(1))
    assert "reads back differently" in problem()


def test_a_packing_by_name_holds_its_own_only() -> None:
    make_format("auto_round:fp8", plan_of(llama(), "FP8_BLOCK"))
    with pytest.raises(PlanError, match="stored as auto_round:llm_compressor"):
        make_format("auto_round:fp8", plan_of(llama(), "MXFP4"))
    with pytest.raises(PlanError, match="stored as packed integers"):
        make_format("auto_round:int8", plan_of(llama(), "W8A16"))
    with pytest.raises(PlanError, match="holds plain integers only"):
        make_format("auto_round:auto_gptq", plan_of(llama(), "INT8"))
    with pytest.raises(PlanError, match=r"auto_round cannot hold .*q_proj: no layout"):
        make_format("auto_round", plan_of(llama(hidden_size=256), "GGUF:Q4_K_M"))


# ---- fp8 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fine_grained_fp8(dtype: torch.dtype, tmp_path: Path) -> None:
    made = export(llama(dtype), "FP8_BLOCK", "fp8", tmp_path, {"layers.1.mlp.up_proj": {"bits": 16}})
    assert set(made.config["modules_to_not_convert"]) == {"lm_head", "model.layers.1.mlp.up_proj"}
    assert torch.equal(made.read(), made.logits())  # without a GPU, Transformers leaves inputs as they are
    artifact = Artifact.open(tmp_path)
    assert layout_problem(artifact) is None
    assert all(torch.equal(artifact.weight(n), tensor.dequantize()) for n, tensor in made.tensors.items())


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FPW8A16", "MXFP4"])
def test_experts_that_transformers_fuses(scheme: str, tmp_path: Path) -> None:
    """Transformers merges experts while it loads: the merged weights are ours."""
    fmt = "fp8" if scheme == "FP8_BLOCK" else "llm_compressor"
    pytest.importorskip("compressed_tensors" if fmt != "fp8" else "torch")
    model = mixtral()
    model.save_pretrained(tmp_path)
    stored, tensors, infos = load_file(tmp_path / "model.safetensors"), {}, []
    for key, value in stored.items():
        if value.dim() == 2 and "embed" not in key and ".gate." not in key:
            block = ".".join(key.split(".")[:3]) if "layers" in key else None
            infos.append(LayerInfo(key.removesuffix(".weight"), *value.shape, block, dtype=value.dtype))
    gates = {f"model.layers.{layer}.block_sparse_moe.gate": "router" for layer in (0, 1)}
    blocks = [["model.layers.0", "model.layers.1"]]
    plan = make_plan(infos, blocks, parse_scheme(scheme), lm_head="lm_head", beside=gates)
    writer = make_format(fmt, plan)
    for name, layer in plan.quantized().items():
        tensors[name] = quantized(stored.pop(f"{name}.weight"), layer.scheme)
        stored |= {f"{name}.{key}": part for key, part in writer.pack(tensors[name], layer.info).items()}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": writer.config({})}))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    fused = loaded.model.layers[1].mlp.experts.gate_up_proj
    for n in range(len(fused)):
        stem = f"model.layers.1.block_sparse_moe.experts.{n}"
        want = torch.cat([tensors[f"{stem}.{w}"].dequantize(fused.dtype) for w in ("w1", "w3")])
        assert torch.equal(fused[n], want)


@pytest.mark.parametrize(
    ("scheme", "changes", "match"),
    [
        ("FPW8A16", {}, "use the scheme FP8_BLOCK"),
        ({"scheme": "FP8_BLOCK", "act_bits": 16}, {}, "readers quantize inputs"),
        ("FP8_BLOCK", {"in_features": 192}, "does not divide into blocks"),
        ("FP8_BLOCK", {"out_features": 192}, "does not divide into blocks"),
        ("FP8_BLOCK", {"transposed": True}, "Conv1D"),
        ("FP8_BLOCK", {"fused": True}, "stores its experts fused"),
    ],
)
def test_what_fine_grained_fp8_cannot_hold(scheme: Any, changes: dict[str, Any], match: str) -> None:
    info = dataclasses.replace(EXPERTS[0], **changes)
    with pytest.raises(PlanError, match=match):
        make_format("fp8", make_plan([info], [["model.layers.0"]], parse_scheme(scheme)))


def test_fp8_refuses_names_that_readers_would_leave_out() -> None:
    block = "model.layers.0"
    infos = [LayerInfo(f"{block}.{name}", 128, 128, block) for name in ("proj", "proj.inner")]
    with pytest.raises(PlanError, match=r"readers would leave it out, as model\.layers\.0\.proj is"):
        make_format("fp8", make_plan(infos, [[block]], parse_scheme("FP8_BLOCK"), {f"{block}.proj": {"bits": 16}}))
