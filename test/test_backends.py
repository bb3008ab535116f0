"""Backends: the table's choices, and each backend against `QuantizedTensor.dequantize`."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from auto_round.data_type.base import QuantizedTensor
from auto_round.formats.packing import AUTO_AWQ, AUTO_GPTQ, GPTQMODEL, PACKINGS, PLAIN, encode
from auto_round.inference.backends import BACKENDS, PackedLayer, ark, backend_names, build_layer, choose_backend
from auto_round.inference.backends import torch_int4 as int4
from auto_round.schemes import TensorSpec

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
LAYER = PackedLayer("block.proj", 128, 256, 4, 64, True, AUTO_GPTQ, torch.bfloat16)


def cases() -> list[PackedLayer]:
    found = []
    for packing in PACKINGS:
        for bits in range(2, 9) if packing != AUTO_AWQ else (4,):
            for sym in (True, False):
                for group_size in (32, 256):
                    changes = {"bits": bits, "sym": sym, "group_size": group_size, "packing": packing}
                    found.append(dataclasses.replace(LAYER, **changes))
    return found


def case_id(layer: PackedLayer) -> str:
    return f"{layer.packing}-w{layer.bits}-{'sym' if layer.sym else 'asym'}-g{layer.group_size}"


def random_layer(layer: PackedLayer) -> tuple[QuantizedTensor, dict[str, torch.Tensor]]:
    """A random quantized tensor and the tensors that a checkpoint has for it."""
    generator = torch.Generator().manual_seed(layer.bits)
    rows, columns, top = layer.out_features, layer.in_features, 1 << layer.bits
    codes = torch.randint(0, top, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = (torch.randn(rows, layer.groups, generator=generator) * 0.01).half()
    zeros = torch.randint(1, top, scale.shape, dtype=torch.uint8, generator=generator)
    if layer.sym:
        zeros = torch.full_like(zeros, top // 2)
    spec = TensorSpec(layer.bits, layer.group_size, layer.sym)
    tensors = {**encode(layer.packing, codes, zeros, layer.bits), "scales": scale.t().contiguous()}
    if layer.has_bias:
        tensors["bias"] = torch.randn(rows, generator=generator).to(layer.dtype)
    return QuantizedTensor(codes, scale, None if layer.sym else zeros, spec), tensors


def loaded(backend: str, layer: PackedLayer, tensors: dict[str, torch.Tensor], device: str = "cpu") -> torch.nn.Module:
    module = build_layer(backend, layer)
    module.load_state_dict(tensors, strict=False)
    module.to(device).post_init()
    return module


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layer", cases(), ids=case_id)
def test_reference_dequantizes_bit_for_bit(layer: PackedLayer, device: str) -> None:
    tensor, tensors = random_layer(layer)
    module = loaded("torch", layer, tensors, device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = module.dequantize(dtype).cpu()
        assert weight.dtype == dtype and torch.equal(weight, tensor.dequantize(dtype))
    x = torch.randn(2, 3, layer.in_features, device=device)
    assert torch.equal(module(x), F.linear(x, module.dequantize(torch.float32)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_bias_and_moves(device: str, dtype: torch.dtype) -> None:
    layer = dataclasses.replace(LAYER, has_bias=True, dtype=dtype)
    tensor, tensors = random_layer(layer)
    module = loaded("torch", layer, tensors, device)
    x = torch.randn(5, layer.in_features, device=device).to(dtype)
    expected = F.linear(x, tensor.dequantize(dtype).to(device), tensors["bias"].to(device))
    assert torch.equal(module(x), expected)
    assert module.weight.dtype == dtype
    module.to(torch.bfloat16)
    assert module.scales.dtype == torch.float16 and torch.equal(module.scales.cpu(), tensors["scales"])


def test_more_rows_than_a_chunk() -> None:
    layer = dataclasses.replace(LAYER, out_features=2080, in_features=512, bits=3)
    tensor, tensors = random_layer(layer)
    assert torch.equal(loaded("torch", layer, tensors).weight, tensor.dequantize(torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 3, int4.MAX_ROWS, int4.MAX_ROWS + 1])
@pytest.mark.parametrize("layer", [case for case in cases() if case.bits == 4], ids=case_id)
def test_int4_agrees_with_the_reference(layer: PackedLayer, rows: int) -> None:
    layer = dataclasses.replace(layer, has_bias=rows == 3)
    _, tensors = random_layer(layer)
    module, reference = loaded("torch_int4", layer, tensors), loaded("torch", layer, tensors)
    assert torch.equal(module.dequantize(torch.float32), reference.dequantize(torch.float32))
    x = torch.randn(1, rows, layer.in_features).bfloat16()
    with torch.no_grad():
        y, expected = module(x), reference(x)
    exact = F.linear(
        x.double(), reference.dequantize(torch.float64), None if module.bias is None else module.bias.double()
    )
    assert y.shape == expected.shape and y.dtype == torch.bfloat16
    if rows > int4.MAX_ROWS:
        assert torch.equal(y, expected)
    # Both differ from the exact product by bfloat16 rounding of weights or scales, and of the result.
    bound = 2**-7 * exact.abs().max()
    assert (y.double() - exact).abs().max() < bound and (expected.double() - exact).abs().max() < bound


@pytest.mark.skipif(find_spec("auto_round_kernel") is None, reason="auto-round-lib is not installed")
@pytest.mark.parametrize("rows", [1, ark.MAX_ROWS, ark.MAX_ROWS + 1])
@pytest.mark.parametrize("layer", cases(), ids=case_id)
def test_kernels_agree_with_the_reference(layer: PackedLayer, rows: int) -> None:
    layer = dataclasses.replace(layer, has_bias=rows == 1, dtype=torch.float32)
    _, tensors = random_layer(layer)
    module = loaded("auto_round_kernel", layer, tensors)
    x = torch.randn(rows, layer.in_features)
    bias = None if module.bias is None else module.bias.double()
    exact = F.linear(x.double(), module.dequantize(torch.float64), bias)
    with torch.no_grad():
        assert (module(x).double() - exact).abs().max() < 1e-5 * exact.abs().max()
    assert module.state_dict().keys() == tensors.keys()


@pytest.mark.parametrize("packing", [AUTO_GPTQ, PLAIN, AUTO_AWQ])
def test_int4_state_dict_is_the_checkpoints(packing: str) -> None:
    layer = dataclasses.replace(LAYER, packing=packing, sym=False, has_bias=True)
    _, tensors = random_layer(layer)
    state = loaded("torch_int4", layer, tensors).state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_int4_gives_gradients_to_its_input() -> None:
    _, tensors = random_layer(LAYER)
    module = loaded("torch_int4", LAYER, tensors)
    x = torch.randn(2, LAYER.in_features, dtype=torch.bfloat16, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None


def test_int4_steps_aside_for_an_unknown_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tensors = random_layer(LAYER)
    monkeypatch.setattr(int4, "_unpack", lambda packed: torch.zeros(packed.shape[0] * 64, packed.shape[1]))
    module = loaded("torch_int4", LAYER, tensors)
    x = torch.randn(2, LAYER.in_features).bfloat16()
    with torch.no_grad():
        assert module.backend == "torch" and torch.equal(module(x), loaded("torch", LAYER, tensors)(x))


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales", "bias"])
@pytest.mark.parametrize("backend", [name for name, row in BACKENDS.items() if LAYER.packing in row.packings])
def test_missing_tensor_is_an_error(backend: str, name: str) -> None:
    layer = dataclasses.replace(LAYER, has_bias=True)
    _, tensors = random_layer(layer)
    del tensors[name]
    with pytest.raises(ValueError, match=rf"no usable tensor block\.proj\.{name}"):
        loaded(backend, layer, tensors)


def test_g_idx_is_checked_and_dropped() -> None:
    layer = dataclasses.replace(LAYER, packing=GPTQMODEL)
    _, tensors = random_layer(layer)
    tensors["g_idx"] = torch.arange(layer.in_features, dtype=torch.int32) // layer.group_size
    module = loaded("torch", layer, tensors)
    assert module.g_idx is None and torch.equal(module.state_dict()["g_idx"], tensors["g_idx"])
    tensors["g_idx"][0] = layer.groups
    with pytest.raises(ValueError, match=r"block\.proj\.g_idx names groups beyond"):
        loaded("torch", layer, tensors)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table as if it had only PyTorch's own code: what is installed here must not matter."""
    monkeypatch.delitem(BACKENDS, "auto_round_kernel")


@pytest.mark.usefixtures("without_kernels")
def test_choice_is_by_priority_and_says_why() -> None:
    assert choose_backend(LAYER, "cpu")[0] == "torch_int4"
    assert choose_backend(LAYER, "cuda") == (
        "torch",
        f"{BACKENDS['torch'].about} (torch_int4 runs on cpu, not cuda)",
    )
    changes = {"bits": 3}, {"dtype": torch.float32}, {"out_features": 96}, {"group_size": 16}
    reasons = "has 4 bits", "computes in bfloat16", "multiple of 64 outputs", "multiple of 32, not 16"
    for change, reason in zip(changes, reasons, strict=True):
        name, why = choose_backend(dataclasses.replace(LAYER, **change), "cpu")
        assert name == "torch" and reason in why


@pytest.mark.parametrize("alias", ["torch", "auto_round", "AUTO_ROUND:torch", "torch_zp"])
def test_a_backend_can_be_asked_for(alias: str) -> None:
    assert choose_backend(LAYER, "cpu", alias)[0] == "torch"


@pytest.mark.usefixtures("without_kernels")
def test_errors_name_layer_scheme_and_every_reason() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'torchh'; did you mean 'torch'\?; known: auto, torch, "):
        backend_names("torchh")
    with pytest.raises(ValueError, match=r"backend 'torch_int4' for block\.proj .*3 bits.*: torch_int4 has 4 bits"):
        choose_backend(dataclasses.replace(LAYER, bits=3), "cpu", "torch_int4")
    with pytest.raises(ValueError, match=r"block\.proj \[128×200\].* torch needs dimensions .*; torch_int4 needs"):
        choose_backend(dataclasses.replace(LAYER, in_features=200), "cpu")


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(BACKENDS["auto_round_kernel"], requires=("no_such_package",))
    monkeypatch.setitem(BACKENDS, "auto_round_kernel", row)
    layer = dataclasses.replace(LAYER, bits=3)
    name, why = choose_backend(layer, "cpu")
    assert name == "torch" and "auto_round_kernel needs the package no_such_package" in why
    with pytest.raises(ValueError, match=r"'ark' for .*: auto_round_kernel needs the package no_such_package"):
        choose_backend(layer, "cpu", "ark")
