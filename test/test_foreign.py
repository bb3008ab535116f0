"""GPTQ and AWQ checkpoints as other tools write them, packed here with NumPy, loaded through `AutoRoundConfig()`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import random_model, tiny_llama
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoRoundConfig, Qwen2Config
from transformers.utils import is_auto_round_available

from auto_round.formats.packing import AUTO_AWQ, AUTO_GPTQ, GPTQMODEL
from auto_round.inference.backends import BACKENDS, ELSEWHERE, PackedLayer, backend_names
from auto_round.inference.backends.torch import QuantLinear
from auto_round.inference.checks import loadable_config

TOKENS = torch.arange(48).view(2, 24)
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each nibble of a word holds (AutoAWQ's gemm)
needs_distribution = pytest.mark.skipif(not is_auto_round_available(), reason="the distribution is not installed")


# ---- packing, from the published layouts -------------------------------------------------------------------------


class Rounded(NamedTuple):
    codes: np.ndarray  # [in, out]
    zeros: np.ndarray  # [groups, out]
    scales: np.ndarray  # float16 [groups, out]
    groups: np.ndarray  # [in], the group of each input

    @property
    def weight(self) -> torch.Tensor:
        """float32 [out, in]."""
        centred = self.codes.astype(np.float32) - self.zeros.astype(np.float32)[self.groups]
        return torch.from_numpy((centred * self.scales.astype(np.float32)[self.groups]).T.copy())


def rounded(weight: np.ndarray, bits: int, size: int, sym: bool, order: np.ndarray | None = None) -> Rounded:
    """Round a float32 [in, out] matrix in groups of `size` inputs, which are consecutive in `order`."""
    inputs, top = len(weight), (1 << bits) - 1
    size = inputs if size == -1 else size
    order = np.arange(inputs) if order is None else order
    groups = np.empty(inputs, np.int64)
    groups[order] = np.arange(inputs) // size
    parts = weight[order].reshape(inputs // size, size, -1)
    low, high = np.minimum(parts.min(1), 0), np.maximum(parts.max(1), 0)
    if sym:
        high = np.maximum(high, -low)
        low = -high
    scales = np.maximum((high - low) / top, 1e-4).astype(np.float16)
    zeros = np.full_like(scales, (top + 1) // 2) if sym else np.clip(np.round(-low / scales), 1, top)
    codes = np.clip(np.round(weight / scales[groups]) + zeros[groups], 0, top).astype(np.uint8)
    return Rounded(codes, zeros.astype(np.int64), scales, groups)


def stream(fields: np.ndarray, bits: int) -> torch.Tensor:
    """[n, m] fields → int32 [n·bits/32, m]: bits run down a column, the lowest first."""
    flags = (fields[:, None, :] >> np.arange(bits)[None, :, None] & 1).reshape(-1, 32, fields.shape[1])
    words = (flags.astype(np.uint64) << np.arange(32, dtype=np.uint64)[None, :, None]).sum(1)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def gptq_tensors(layer: Rounded, bits: int, version: int = 1) -> dict[str, torch.Tensor]:
    zeros = layer.zeros - (version == 1)
    return {
        "qweight": stream(layer.codes.astype(np.int64), bits),
        "qzeros": stream(zeros.T, bits).t().contiguous(),
        "scales": torch.from_numpy(layer.scales),
        "g_idx": torch.from_numpy(layer.groups.astype(np.int32)),
    }


def awq_tensors(layer: Rounded) -> dict[str, torch.Tensor]:
    def words(fields: np.ndarray) -> torch.Tensor:
        nibbles = fields.astype(np.uint32).reshape(len(fields), -1, 8)[:, :, list(AWQ_PLACES)]
        packed = np.bitwise_or.reduce(nibbles << (4 * np.arange(8, dtype=np.uint32)), axis=-1)
        return torch.from_numpy(packed.view(np.int32))

    return {"qweight": words(layer.codes), "qzeros": words(layer.zeros), "scales": torch.from_numpy(layer.scales)}


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    size=st.sampled_from([-1, 32, 64]),
    sym=st.booleans(),
    kind=st.sampled_from([AUTO_GPTQ, GPTQMODEL, AUTO_AWQ]),
    reordered=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_reference_reads_the_published_layouts(bits, size, sym, kind, reordered, seed):
    generator = np.random.default_rng(seed)
    awq = kind == AUTO_AWQ
    bits, reordered = (4, False) if awq else (bits, reordered)
    matrix = generator.normal(size=(128, 64)).astype(np.float32)
    layer = rounded(matrix, bits, size, sym, generator.permutation(128) if reordered else None)
    tensors = awq_tensors(layer) if awq else gptq_tensors(layer, bits, 1 if kind == AUTO_GPTQ else 2)
    described = PackedLayer("proj", 64, 128, bits, 128 if size == -1 else size, sym, kind, torch.float32)
    module = QuantLinear(described)
    module.load_state_dict(tensors, strict=False)
    module.post_init()
    assert torch.equal(module.weight, layer.weight)
    saved = module.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())


# ---- whole models ------------------------------------------------------------------------------------------------


def qwen2() -> nn.Module:
    """A model with biases."""
    config = Qwen2Config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        tie_word_embeddings=False,
    )
    model = random_model(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def llama() -> nn.Module:
    return tiny_llama(hidden_size=128, intermediate_size=256)


def foreign(
    folder: Path,
    config: dict[str, Any],
    build: Any = llama,
    kept: tuple[str, ...] = ("lm_head",),
    widths: dict[str, int] | None = None,
    reordered: bool = False,
) -> nn.Module:
    """Write a checkpoint with that `quantization_config`; returns the dense model with the dequantized weights.

    widths: part of a name → bits other than the configuration's.
    """
    model, tensors, generator = build(), {}, np.random.default_rng(0)
    awq = config["quant_method"] == "awq"
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or any(part in name for part in kept):
            continue
        bits = next((width for part, width in (widths or {}).items() if part in name), config["bits"])
        matrix = module.weight.detach().numpy().T
        order = generator.permutation(len(matrix)) if reordered else None
        sym = not config["zero_point"] if awq else config["sym"]
        layer = rounded(matrix, bits, config["group_size"], sym, order)
        version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
        parts = awq_tensors(layer) if awq else gptq_tensors(layer, bits, version)
        tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in parts.items()})
        module.weight.data = layer.weight
        if module.bias is not None:
            module.bias.data = module.bias.data.half().float()
    for name, tensor in model.state_dict().items():
        if f"{name.removesuffix('.weight')}.qweight" not in tensors:
            tensors[name] = tensor.half() if name.endswith("bias") else tensor
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = model.config.to_dict() | {"architectures": [type(model).__name__], "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(written, default=str))
    return model


def load(folder: Path, **options: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, **{"dtype": torch.float32, "quantization_config": AutoRoundConfig(), **options}
    )


@torch.no_grad()
def assert_same_output(model: nn.Module, dense: nn.Module, layers: int) -> None:
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(packed) == layers
    for name, module in packed.items():
        assert torch.equal(module.weight, dense.get_submodule(name).weight), name
    got, want = model(TOKENS).logits, dense(TOKENS).logits
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False, "damp_percent": 0.01}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
RULES = {r"+:.*\.down_proj$": {"bits": 8}, r"-:model\.layers\.0\.self_attn.*": {}, r".*\.up_proj": {"bits": 3}}

CHECKPOINTS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    **{f"gptq w{bits}": ({**GPTQ, "bits": bits}, {}, 14) for bits in (2, 3, 4, 8)},
    "gptq asymmetric": ({**GPTQ, "sym": False}, {}, 14),
    "gptq asymmetric, 3 bits": ({**GPTQ, "sym": False, "bits": 3}, {}, 14),
    "gptq per channel": ({**GPTQ, "group_size": -1}, {}, 14),
    "gptq with biases": (GPTQ, {"build": qwen2}, 14),
    "gptq v2": ({**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}, {}, 14),
    "gptq act-order": ({**GPTQ, "desc_act": True}, {"reordered": True}, 14),
    "gptq act-order asymmetric": ({**GPTQ, "desc_act": True, "sym": False, "bits": 3}, {"reordered": True}, 14),
    "gptq act-order, static groups": ({**GPTQ, "desc_act": True, "static_groups": True}, {}, 14),
    "gptq lm_head": ({**GPTQ, "lm_head": True}, {"kept": ()}, 15),
    "gptq some modules": (
        {**GPTQ, "modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]]},
        {"kept": ("lm_head", "v_proj", "o_proj", "gate_proj", "up_proj")},
        6,
    ),
    "gptq dynamic": (
        {**GPTQ, "dynamic": RULES},
        {"kept": ("lm_head", "layers.0.self_attn"), "widths": {"down_proj": 8, "up_proj": 3}},
        10,
    ),
    "awq": (AWQ, {}, 14),
    "awq g128": ({**AWQ, "group_size": 128}, {}, 14),
    "awq without zero points": ({**AWQ, "zero_point": False}, {}, 14),
    "awq with float16 biases": ({**AWQ, "modules_to_not_convert": None}, {"build": qwen2}, 14),
    "awq, modules kept": (
        {**AWQ, "modules_to_not_convert": ["lm_head", "layers.1.mlp", "v_proj"]},
        {"kept": ("lm_head", "layers.1.mlp", "v_proj")},
        9,
    ),
    "awq, parts of names kept": ({**AWQ, "modules_to_not_convert": ["gate"]}, {"kept": ("lm_head", "gate")}, 12),
}


@needs_distribution
@pytest.mark.parametrize(("config", "options", "layers"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_foreign_checkpoints(tmp_path: Path, config: dict, options: dict, layers: int):
    dense = foreign(tmp_path, config, **options)
    assert_same_output(load(tmp_path), dense, layers)


@needs_distribution
@pytest.mark.parametrize("backend", ["auto", "torch_int4"])
def test_act_order_goes_to_the_reference(tmp_path: Path, backend: str):
    foreign(tmp_path, {**GPTQ, "desc_act": True}, reordered=True)
    model = load(tmp_path, dtype=torch.bfloat16, quantization_config=AutoRoundConfig(backend=backend))
    used = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert {module.backend for module in used} == {"torch"} and "act-order" in used[0].backend_reason
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@needs_distribution
def test_act_order_without_its_order_is_refused(tmp_path: Path):
    foreign(tmp_path, GPTQ)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".g_idx")}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    load(tmp_path)
    edit(tmp_path, desc_act=True)
    with pytest.raises(ValueError, match=r"q_proj has no g_idx, but desc_act"):
        load(tmp_path)


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


# ---- configurations in other places and forms --------------------------------------------------------------------


def load_by_folder(folder: Path) -> nn.Module:
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = loadable_config(folder)
    return load(folder, config=config)


@needs_distribution
@pytest.mark.parametrize(
    ("file", "config", "written"),
    [
        ("quantize_config.json", GPTQ, {k: v for k, v in GPTQ.items() if k != "quant_method"}),
        ("quant_config.json", AWQ, {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_a_config_in_a_file_of_its_own(tmp_path: Path, file: str, config: dict, written: dict):
    dense = foreign(tmp_path, config)
    outer = json.loads((tmp_path / "config.json").read_text())
    del outer["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(outer))
    assert loadable_config(tmp_path) is None
    (tmp_path / file).write_text(json.dumps(written))
    assert_same_output(load_by_folder(tmp_path), dense, 14)


@needs_distribution
def test_the_meta_of_gptqmodel(tmp_path: Path):
    meta = {"quantizer": ["gptqmodel:5.6.0"], "uri": "https://github.com/modelcloud/gptqmodel", "static_groups": False}
    dense = foreign(tmp_path, {**GPTQ, "checkpoint_format": "gptq", "meta": meta})
    with pytest.raises(NotImplementedError, match="gptq"):  # Transformers' own refusal
        load(tmp_path)
    assert_same_output(load_by_folder(tmp_path), dense, 14)


@needs_distribution
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin': only gptq and gptq_v2"),
        ({"dynamic": {"+:.*q_proj": {"bits": 1}}}, r"dynamic\['\+:\.\*q_proj'\]: bits=1 is not supported"),
        ({"dynamic": {"(": {"bits": 8}}}, r"invalid regular expression '\('"),
        ({"modules_in_block_to_quantize": 5}, "modules_in_block_to_quantize must be a list of names, not int"),
        ({"group_size": 48}, r"group size 48 of .* does not divide its \d+ inputs"),
    ],
)
def test_configs_that_say_nothing_sensible(tmp_path: Path, changes: dict, message: str):
    foreign(tmp_path, GPTQ)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


# ---- names of backends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("auto_round", "auto_round:torch", "auto_round:torch_zp", "torch", "torch_zp", "awq_torch"),
        *("gptqmodel:awq_torch", "auto_round_kernel", "auto_round_kernel_zp", "auto_round_kernel_awq", "ark"),
    ],
)
def test_names_of_other_loaders_mean_rows(name: str):
    assert backend_names(name) and set(backend_names(name)) <= BACKENDS.keys()


@pytest.mark.parametrize(
    ("name", "whose"),
    [
        *((name, "GPTQModel") for name in ("marlin", "gptqmodel", "gptqmodel:marlin_zp", "exllamav2")),
        *((name, "GPTQModel") for name in ("gptqmodel:awq_gemm", "gptqmodel:exllamav2", "gptqmodel_awq")),
        *((name, "AutoGPTQ") for name in ("gptq", "auto_gptq:cuda", "auto_gptq:exllamav2")),
        *((name, "AutoAWQ") for name in ("awq", "auto_awq", "awq:gemm")),
        *((name, "Triton") for name in ("triton", "auto_round:tritonv2_zp")),
        *((name, "Humming") for name in ("humming", "auto_round:humming_awq")),
        *(("hpu", "Gaudi"), ("hpu_zp", "Gaudi"), ("mlx", "Apple"), ("auto_round_kernel_xpu", "XPU")),
        *(("auto_round:fake", "floats"), ("cute_nvfp4_e5m3", "CuTe")),
    ],
)
def test_kernels_that_are_not_here_are_named(name: str, whose: str):
    with pytest.raises(ValueError, match=rf"unknown backend '{name}'; known: auto, torch, .* means .*{whose}"):
        backend_names(name)
    assert any(whose in meaning for meaning in ELSEWHERE.values())


@needs_distribution
def test_a_backend_that_does_not_fit_says_which_do(tmp_path: Path):
    foreign(tmp_path, {**GPTQ, "bits": 3})
    with pytest.raises(ValueError, match=r"'torch_int4' .*torch_int4 has 4 bits; usable: torch"):
        load(tmp_path, quantization_config=AutoRoundConfig(backend="torch_int4"))
