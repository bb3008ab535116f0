"""Artifacts written by formats and writer, loaded by Transformers: the same weights bit for bit, the same logits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoRoundConfig, GPT2Config, LlamaConfig, Qwen2Config
from transformers.utils import is_auto_round_available

from auto_round.data_type.base import QuantizedTensor, grouped
from auto_round.formats import make_format
from auto_round.formats.writer import CheckpointWriter, write_config
from auto_round.inference.backends.torch import QuantLinear
from auto_round.inference.convert_model import get_layer_config, infer_target_device
from auto_round.modeling.streaming import TensorShape
from auto_round.plan import LayerInfo, ModelPlan, make_plan
from auto_round.schemes import TensorSpec, parse_scheme
from auto_round.utils.common import is_supported_layer, is_transposed

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
TOKENS = torch.arange(48).view(2, 24)

pytestmark = pytest.mark.skipif(not is_auto_round_available(), reason="the distribution is not installed")


def tiny(kind: str = "llama", **changes: Any) -> nn.Module:
    """A random two-block model."""
    torch.manual_seed(0)
    common = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "vocab_size": 256, "tie_word_embeddings": False, "dtype": "bfloat16"}
    configs = {
        "llama": lambda: LlamaConfig(**common | changes),
        "qwen2": lambda: Qwen2Config(**common | changes),
        "gpt2": lambda: GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=256, dtype="bfloat16", **changes),
    }
    model = AutoModelForCausalLM.from_config(configs[kind](), dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def find_layers(model: nn.Module) -> tuple[list[LayerInfo], list[str]]:
    root = "transformer.h" if model.config.model_type == "gpt2" else "model.layers"
    blocks = [f"{root}.{index}" for index in range(2)]
    infos = []
    for name, module in model.named_modules():
        if is_supported_layer(module):
            shape = tuple(module.weight.shape)
            out, columns = shape[::-1] if is_transposed(module) else shape
            block = next((block for block in blocks if name.startswith(block + ".")), None)
            tied = name == "lm_head" and bool(model.config.tie_word_embeddings)
            infos.append(LayerInfo(name, out, columns, block, tied=tied, transposed=is_transposed(module)))
    return infos, blocks


def round_to_nearest(weight: torch.Tensor, spec: TensorSpec) -> QuantizedTensor:
    """Plain rounding: [out, in] weight to codes, with negative scales in the symmetric case to exercise them."""
    groups = grouped(weight.float(), spec.group_size)
    top = (1 << spec.bits) - 1
    if spec.sym:
        scale = -(groups.abs().amax(-1) / (1 << (spec.bits - 1))).clamp(min=1e-5).half()
        zero = torch.full_like(scale, 1 << (spec.bits - 1), dtype=torch.float32)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / top).clamp(min=1e-5).half()
        zero = (-low / scale.float()).round().clamp(0, top)
    codes = ((groups / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, top)
    zeros = None if spec.sym else zero.to(torch.uint8)
    return QuantizedTensor(codes.to(torch.uint8).view(weight.shape), scale, zeros, spec)


class Artifact(NamedTuple):
    folder: Path
    plan: ModelPlan
    quantized: Mapping[str, QuantizedTensor]
    fake: nn.Module  # the source model with dequantized weights


def write_artifact(folder: Path, model: nn.Module, scheme: Mapping[str, Any], **options: Any) -> Artifact:
    """Quantize a model's weights by rounding and write the checkpoint, keeping the dequantized model beside it."""
    infos, blocks = find_layers(model)
    name = options.pop("format", "auto_round")
    top = parse_scheme("W4A16", group_size=32, **{}).override(**scheme)
    plan = make_plan(infos, [blocks], top, options.pop("layer_config", None), lm_head="lm_head", **options)
    bound = make_format(name, plan)
    tensors = {k: v for k, v in model.state_dict().items() if not (k == "lm_head.weight" and infos[-1].tied)}
    quantized = {}
    for layer in plan.quantized().values():
        module = model.get_submodule(layer.name)
        weight = module.weight.t().contiguous() if layer.info.transposed else module.weight
        quantized[layer.name] = round_to_nearest(weight.detach(), layer.scheme.weight)
        del tensors[f"{layer.name}.weight"]
        packed = bound.pack(quantized[layer.name], layer.info)
        tensors.update({f"{layer.name}.{suffix}": tensor for suffix, tensor in packed.items()})
        value = quantized[layer.name].dequantize(module.weight.dtype)
        module.weight.data = value.t().contiguous() if layer.info.transposed else value
    with CheckpointWriter(folder, [(k, TensorShape(tuple(v.shape), v.dtype)) for k, v in tensors.items()]) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
    write_config(model.config.to_dict(), bound.config({"iters": 0}), folder)
    return Artifact(folder, plan, quantized, model)


def load(artifact: Artifact | Path, device: str = "cpu", **options: Any) -> nn.Module:
    folder = artifact if isinstance(artifact, Path) else artifact.folder
    options.setdefault("dtype", "auto")
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device, **options)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS.to(model.device)).logits.float().cpu()


def assert_same_weights(model: nn.Module, artifact: Artifact) -> None:
    """Every packed layer holds the codes, and the float16 scales, bit for bit; nothing else is packed."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert packed.keys() == artifact.quantized.keys()
    for name, module in packed.items():
        rows = artifact.quantized[name].per_row()
        assert module.scales.dtype == torch.float16 and torch.equal(module.scales.cpu().t(), rows.scale), name
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(module.dequantize(dtype).cpu(), rows.dequantize(dtype)), name
    others = {name: tensor for name, tensor in model.state_dict().items() if name.rsplit(".", 1)[0] not in packed}
    for name, tensor in others.items():
        expected = artifact.fake.state_dict()[name]
        assert torch.equal(tensor.cpu(), expected.cpu().to(tensor.dtype)), name


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


CASES = {
    "gptq-w4": ({}, {}),
    "gptq-w2": ({"bits": 2}, {}),
    "gptq-w3": ({"bits": 3}, {}),
    "gptq-w5": ({"bits": 5, "group_size": 64}, {}),
    "gptq-w8-channel": ({"bits": 8, "group_size": -1}, {}),
    "gptq-w4-tensor": ({"group_size": 0}, {}),
    "awq-w4-asym": ({"sym": False}, {}),
    "awq-w4-sym": ({}, {"format": "auto_round:auto_awq"}),
    "plain-w2-asym": ({"bits": 2, "sym": False}, {}),
    "plain-w3-asym": ({"bits": 3, "sym": False}, {}),
    "plain-w6-asym": ({"bits": 6, "sym": False}, {}),
    "plain-w7-asym": ({"bits": 7, "sym": False}, {}),
    "plain-w8-asym-tensor": ({"bits": 8, "sym": False, "group_size": 0}, {}),
    "gptqmodel-w4-asym": ({"sym": False}, {"format": "auto_round:gptqmodel"}),
    "lm_head": ({}, {"quant_lm_head": True}),
    "mixed": (
        {},
        {
            "layer_config": {
                "down_proj": {"bits": 8, "sym": False},
                "layers.0.self_attn.q_proj": {"bits": 16},
                "up_proj": {"bits": 3},
            }
        },
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("scheme", "options"), CASES.values(), ids=CASES)
def test_reloaded_equals_quantized(tmp_path: Path, scheme: dict, options: dict, device: str) -> None:
    artifact = write_artifact(tmp_path, tiny(), scheme, **dict(options))
    model = load(artifact, device, quantization_config=AutoRoundConfig(backend="torch"))
    assert_same_weights(model, artifact)
    assert torch.equal(logits(model), logits(artifact.fake.to(device)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_dtypes_and_architectures(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Biases (Qwen2), Conv1D and tied embeddings (GPT-2); any model dtype leaves the scales alone."""
    artifact = write_artifact(tmp_path, tiny(kind), {"sym": False})
    model = load(artifact, dtype=dtype)
    assert model.dtype == dtype
    assert_same_weights(model, artifact)
    reference = artifact.fake.to(dtype)
    for name, tensor in artifact.quantized.items():  # dequantized once, straight to the dtype
        weight = tensor.dequantize(dtype)
        module = reference.get_submodule(name)
        module.weight.data = weight.t().contiguous() if is_transposed(module) else weight
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # `to` casts rotary tables too, `from_pretrained` does not
    assert relative(logits(model), logits(reference)) < tolerance


def test_auto_uses_the_int4_operator_on_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    artifact = write_artifact(tmp_path, tiny(), {"group_size": 64})
    with caplog.at_level("INFO", "auto_round"):
        model = load(artifact)
    assert "backend torch_int4 for 14 layers on cpu" in caplog.text
    used = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert {module.backend for module in used} == {"torch_int4"} and all(module.backend_reason for module in used)
    assert_same_weights(model, artifact)
    assert relative(logits(model), logits(artifact.fake)) < 0.02


def test_generation_and_saving_again(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "first", tiny(), {"sym": False})
    model = load(artifact)
    assert model.generate(TOKENS[:, :4], max_new_tokens=4, do_sample=False).shape == (2, 8)
    model.save_pretrained(tmp_path / "second")
    again = load(tmp_path / "second")
    assert_same_weights(again, artifact)
    assert torch.equal(logits(again), logits(model))


def test_base_model_class_has_other_names(tmp_path: Path) -> None:
    rules = {"layers.0.mlp.up_proj": {"bits": 8}, "layers.1.mlp.up_proj": {"bits": 16}}
    artifact = write_artifact(tmp_path, tiny(), {}, layer_config=rules)
    model = AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert model.layers[0].mlp.up_proj.layer.bits == 8
    assert isinstance(model.layers[1].mlp.up_proj, nn.Linear)
    weight = artifact.quantized["model.layers.0.mlp.up_proj"].dequantize(torch.bfloat16)
    assert torch.equal(model.layers[0].mlp.up_proj.weight, weight)


@pytest.mark.parametrize(("method", "name"), [("gptq", "auto_round:auto_gptq"), ("awq", "auto_round:auto_awq")])
def test_plain_gptq_and_awq_checkpoints(tmp_path: Path, method: str, name: str) -> None:
    artifact = write_artifact(tmp_path, tiny(), {}, format=name)
    foreign = {"bits": 4, "group_size": 32, "quant_method": method}
    foreign |= {"desc_act": False, "sym": True} if method == "gptq" else {"zero_point": False, "version": "gemm"}
    if method == "gptq":
        tensors = load_file(tmp_path / "model.safetensors")
        groups = {
            key.replace("qweight", "g_idx"): torch.arange(value.shape[0] * 8, dtype=torch.int32) // 32
            for key, value in tensors.items()
            if key.endswith("qweight")
        }
        save_file({**tensors, **groups}, tmp_path / "model.safetensors", {"format": "pt"})
    edit_config(tmp_path, lambda config: config.update(quantization_config=foreign))
    model = load(tmp_path, quantization_config=AutoRoundConfig())
    assert_same_weights(model, artifact)


def edit_config(folder: Path, edit: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_extra_config_patterns(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path, tiny(), {}, layer_config={"down_proj": {"bits": 8}, "v_proj": {"bits": 16}})
    patterns = {".*down_proj.*": {"bits": 8, "group_size": 32}, ".*v_proj$": {"bits": 16, "data_type": "float"}}
    edit_config(tmp_path, lambda config: config["quantization_config"].update(extra_config=patterns))
    assert_same_weights(load(artifact), artifact)
    edit_config(tmp_path, lambda config: config["quantization_config"].update(extra_config={"*down": {"bits": 8}}))
    with pytest.raises(ValueError, match=r"invalid regular expression '\*down'"):
        load(artifact)


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_missing_tensor_is_an_error(tmp_path: Path, suffix: str) -> None:
    artifact = write_artifact(tmp_path, tiny(), {})
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{suffix}"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.mlp\.up_proj(\.| has no ){suffix}"):
        load(artifact)


def test_wrong_group_size_is_an_error(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path, tiny(), {})
    edit_config(tmp_path, lambda config: config["quantization_config"].update(group_size=64))
    with pytest.raises((ValueError, RuntimeError), match=r"layers\.0|mismatch"):
        load(artifact)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing_format": "auto_round:fp8"}, "unknown packing format 'auto_round:fp8'"),
        ({"data_type": "mx_fp"}, r"no model\.layers\.0\.self_attn\.q_proj\.weight_packed"),
        ({"extra_config": {"model.embed_tokens": {"bits": 4}}}, "Embedding cannot be replaced"),
    ],
)
def test_configs_that_cannot_be_served(tmp_path: Path, changes: dict, message: str) -> None:
    artifact = write_artifact(tmp_path, tiny(), {})
    edit_config(tmp_path, lambda config: config["quantization_config"].update(changes))
    with pytest.raises(ValueError, match=message):
        load(artifact)


def test_unknown_backend(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path, tiny(), {})
    with pytest.raises(ValueError, match="unknown backend 'marlin'; known: auto, torch"):
        load(artifact, quantization_config=AutoRoundConfig(backend="marlin"))


def test_layer_config_precedence() -> None:
    model = tiny()
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"

    def bits(**settings: Any) -> dict[str, int]:
        found = get_layer_config(model, {"bits": 4, "group_size": 32, "sym": True, **settings})
        return {name: scheme.bits for name, scheme in found.items()}

    assert set(bits().values()) == {4} and len(bits()) == 14 and "lm_head" not in bits()
    assert len(bits(block_name_to_quantize="model.layers.1")) == 7
    assert len(bits(quant_block_list=[["model.layers.0", "model.layers.1"]])) == 14
    extra = bits(
        extra_config={".*up_proj": {"bits": 8}, up: {"bits": 2}, "mlp.gate": {"bits": 16}, "lm_head": {"bits": 8}}
    )
    assert (extra[up], extra["model.layers.1.mlp.up_proj"], extra["lm_head"]) == (2, 8, 8)
    assert extra["model.layers.0.mlp.gate_proj"] == 4, "a name is not a prefix of another name"
    skipped = bits(modules_to_not_convert=["down_proj", "self_attn"])
    assert skipped[down] == skipped["model.layers.1.self_attn.q_proj"] == 16 and skipped[up] == 4
    only = bits(modules_in_block_to_quantize=[["mlp.up_proj"], ["mlp.down_proj"]])
    assert sorted(only.values()) == [4] * 4 + [16] * 10
    dynamic = bits(dynamic={r"-:.*layers\.1\..*": {}, r"+:.*up_proj.*": {"bits": 8}})
    assert (dynamic[up], dynamic[down], dynamic["model.layers.1.mlp.up_proj"]) == (8, 4, 16)


@pytest.mark.parametrize(
    ("device_map", "device"),
    [(None, "cpu"), ("cpu", "cpu"), ({"": "cpu"}, "cpu"), ({"a": "disk", "b": "cuda:1"}, "cuda"), ("xpu:0", "xpu")],
)
def test_target_device(device_map: Any, device: str) -> None:
    assert infer_target_device(device_map) == device
