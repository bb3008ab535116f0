"""Floating and block-scaled number families: nearest values, exact survivors, and agreement with other readers."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.data_type import data_type
from auto_round.data_type.base import WeightTask
from auto_round.data_type.float_codes import E2M1, E4M3, QUARTERS, largest_of, restored, spread, viewed
from auto_round.data_type.nvfp import GLOBAL
from auto_round.schemes import TensorSpec

SPECS = {
    "mxfp4": TensorSpec(4, 32, True, "mx_fp"),
    "mxfp8": TensorSpec(8, 32, True, "mx_fp"),
    "mxfp4_rceil": TensorSpec(4, 32, True, "mx_fp_rceil"),
    "mxint4": TensorSpec(4, 32, True, "mx_int"),
    "nvfp4": TensorSpec(4, 16, True, "nv_fp"),
    "fp8_row": TensorSpec(8, -1, True, "fp"),
    "fp8_tensor": TensorSpec(8, 0, True, "fp"),
    "fp8_block": TensorSpec(8, (16, 32), True, "fp"),
    "fp8_ragged": TensorSpec(8, (12, 24), True, "fp"),
}
INPUTS = {
    "mxfp4": SPECS["mxfp4"],
    "mxfp8": SPECS["mxfp8"],
    "mxint4": SPECS["mxint4"],
    "nvfp4": TensorSpec(4, 16, True, "nv_fp4_with_static_gs"),
    "fp8_token": TensorSpec(8, -1, True, "fp"),
    "fp8_group": TensorSpec(8, 24, True, "fp"),
    "fp8_static": TensorSpec(8, 0, True, "fp", dynamic=False),
    "int8": TensorSpec(8, -1, True),
    "int8_static": TensorSpec(8, 0, True, dynamic=False),
}
FIXED = ("nvfp4", "fp8_static", "int8_static")

seeds = st.integers(0, 1000)
families = st.sampled_from(sorted(SPECS))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def weight(seed, scale=0.02, rows=40, columns=64, dtype=torch.float32):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def grid_of(spec):
    return QUARTERS if spec.data_type == "mx_int" else E2M1 if spec.bits == 4 else E4M3


def points(spec):
    """All values of the grid, ascending."""
    grid = grid_of(spec)
    codes = torch.arange(1, 16) if grid is QUARTERS else torch.arange(1 << spec.bits)
    values = grid.decode(codes.to(torch.uint8))
    return values[values.isfinite()].unique()


def plain_scale(tensor):
    """The scale of every weight, from the stored tensors, as the documentation of the families has it."""
    scale = tensor.scale.float()
    if tensor.spec.data_type.startswith("mx"):
        scale = torch.tensor([2.0 ** (byte - 127) for byte in tensor.scale.flatten().tolist()]).view(scale.shape)
    if GLOBAL in tensor.extra:
        scale = scale / tensor.extra[GLOBAL]
    rows, columns = tensor.codes.shape
    high, wide = tensor.spec.group_size if isinstance(tensor.spec.group_size, tuple) else (1, tensor.group_size)
    high = rows if scale.shape[0] == 1 else high
    return scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]


def quantized(w, spec, **more):
    return data_type(spec.data_type).quantize(WeightTask(w, spec, **more))


@pytest.mark.parametrize("grid", [E2M1, E4M3, QUARTERS])
def test_codes_are_the_values(grid):
    codes = torch.arange(1, 16) if grid is QUARTERS else torch.arange(256 if grid is E4M3 else 16)
    codes = codes.to(torch.uint8)
    values = grid.decode(codes)
    codes, values = codes[values.isfinite()], values[values.isfinite()]
    assert torch.equal(grid.round_(values.clone()), values)
    again = grid.encode(values)
    assert torch.equal(grid.decode(again), values)
    assert torch.equal(again[values != 0], codes[values != 0])


def test_ties_go_to_even_codes():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 1e9])
    expected = torch.tensor([0.0, 1, 1, 2, 2, 4, 4, 6, 6])
    assert torch.equal(E2M1.round_(ties.clone()), expected)
    assert torch.equal(E2M1.round_(-ties), -expected)


@settings(max_examples=50, deadline=None)
@given(seed=seeds, spread_=st.sampled_from([1e-3, 0.1, 10.0, 300.0]))
def test_e4m3_rounds_as_the_dtype_does(seed, spread_):
    x = weight(seed, spread_).clamp(-448, 448)
    assert torch.equal(E4M3.round_(x.clone()), x.to(torch.float8_e4m3fn).float())


@settings(max_examples=60, deadline=None)
@given(name=families, seed=seeds, scale=st.sampled_from([1e-8, 0.02, 1e4]), dtype=dtypes, search=st.booleans())
def test_every_weight_gets_the_nearest_value(name, seed, scale, dtype, search):
    spec = SPECS[name]
    w = weight(seed, scale, dtype=dtype)
    before = w.clone()
    tensor = quantized(w, spec, search=search)
    assert torch.equal(w, before)
    wide, values = plain_scale(tensor), points(spec)
    quotient = w.float() / wide
    distance = (quotient.unsqueeze(-1) - values).abs().amin(-1)
    found = tensor.dequantize()
    assert torch.isfinite(found).all()
    assert torch.allclose((found / wide - quotient).abs(), distance, rtol=1e-5, atol=1e-6)
    assert (found * w >= 0).all()


@settings(max_examples=40, deadline=None)
@given(name=families, seed=seeds, search=st.booleans())
def test_representable_weights_survive(name, seed, search):
    spec = SPECS[name]
    first, most = quantized(weight(seed), spec), weight(seed).abs().max().item()
    w = first.dequantize()
    if spec.data_type == "fp":
        # So that the largest code is in use again, and with it the same scale.
        w = torch.where(largest_spread(w, spec) == w.abs(), w.sign() * 448 * plain_scale(first), w)
    # The maximum that is passed keeps NVFP4's global scale: w may have a smaller one of its own.
    again = quantized(w, spec, search=search, fused_max=most)
    assert torch.equal(again.dequantize(), w)


def largest_spread(w, spec):
    view = viewed(w, spec.group_size)
    return restored(
        spread(largest_of(w, spec.group_size), spec.group_size).expand(view.shape), w.shape, spec.group_size
    )


@pytest.mark.parametrize("name", sorted(SPECS))
def test_zeros_stay_zero(name):
    w = weight(1)
    w[:8] = 0
    for part in (w, torch.zeros_like(w)):
        for search in (False, True):
            found = quantized(part, SPECS[name], search=search).dequantize()
            assert torch.isfinite(found).all()
            assert torch.equal(found[:8], part[:8])


@settings(max_examples=40, deadline=None)
@given(name=families, seed=seeds)
def test_searched_scales_are_never_worse(name, seed):
    w, importance = weight(seed), torch.rand(64, generator=torch.Generator().manual_seed(seed)) + 0.1
    errors = []
    for search in (False, True):
        found = quantized(w, SPECS[name], search=search, importance=importance).dequantize()
        errors.append(((found - w).square() * importance).sum().item())
    assert errors[1] <= errors[0] * (1 + 1e-6)


@pytest.mark.parametrize("name, share", [("mxfp4", 0.99), ("mxint4", 0.97), ("nvfp4", 0.9)])
def test_the_search_heeds_importance(name, share):
    w, importance = weight(3), torch.full((64,), 0.01)
    importance[::5] = 10

    def error(**more):
        return ((quantized(w, SPECS[name], **more).dequantize() - w).square() * importance).sum()

    aware = error(search=True, importance=importance)
    assert aware < share * error(search=True)
    assert aware < share * error()


@settings(max_examples=40, deadline=None)
@given(name=families, seed=seeds, offset=st.floats(-0.6, 0.6), dtype=dtypes)
def test_what_the_loss_sees_is_what_is_stored(name, seed, offset, dtype):
    spec = SPECS[name]
    w = weight(seed, dtype=dtype)
    before = w.clone()
    tunable = data_type(spec.data_type).tunable(WeightTask(w, spec, search=True))
    assert torch.equal(tunable.finish().dequantize(), quantized(w, spec, search=True).dequantize())
    with torch.no_grad():
        tunable.value.add_(torch.randn(tunable.value.shape) * offset)
    assert torch.equal(tunable.fake_quantize(dtype), tunable.finish().dequantize(dtype))
    assert torch.equal(w, before)
    tunable.reset()
    assert torch.equal(tunable.finish().dequantize(), quantized(w, spec, search=True).dequantize())


@pytest.mark.parametrize("name", sorted(SPECS))
def test_gradients_are_those_of_the_formula(name):
    """The written-out backward equals autograd on the same expression with straight-through rounding."""
    spec = SPECS[name]
    tunable = data_type(spec.data_type).tunable(WeightTask(weight(1), spec))
    with torch.no_grad():
        tunable.value.copy_(torch.rand(tunable.value.shape) - 0.5)
        tunable.value[..., ::7] = 100  # saturates any grid
    upstream = torch.randn(40, 64)
    tunable.fake_quantize(torch.float32).backward(upstream)
    value = tunable.value.detach().clone().requires_grad_()
    _autograd(tunable, value).backward(upstream)
    assert (value.grad == 0).any()
    assert torch.allclose(tunable.value.grad, value.grad, rtol=1e-5, atol=1e-7)


def _autograd(tunable, value):
    most = tunable.grid.largest
    scale = spread(tunable.scale, tunable.size)
    moved = (tunable.weight / scale + value * tunable.grid.unit).clamp(-most, most)
    rounded = moved + (tunable.grid.round_(moved.detach().clone()) - moved).detach()
    return restored(rounded * scale, tunable.shape, tunable.size)


def test_offsets_move_codes_to_their_neighbours():
    w = torch.tensor([[6.0, 0.3, 0.9, 1.2, 1.7, 2.4, 3.3, 4.9] * 4])
    tunable = data_type("mx_fp").tunable(WeightTask(w, SPECS["mxfp4"]))
    assert tunable.finish().dequantize()[0, :8].tolist() == [6, 0.5, 1, 1, 1.5, 2, 3, 4]
    tunable.value.data.fill_(0.5)
    assert tunable.finish().dequantize()[0, :8].tolist() == [6, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_fused_layers_share_the_global_scale():
    big, small = weight(1), weight(2, 0.01)
    most = big.abs().max().item()
    tensors = [quantized(w, SPECS["nvfp4"], fused_max=most) for w in (big, small)]
    assert torch.equal(tensors[0].extra[GLOBAL], tensors[1].extra[GLOBAL])
    assert tensors[0].extra[GLOBAL].item() == 2 ** math.floor(math.log2(2688 / most))
    relative = [(t.dequantize() - w).norm() / w.norm() for t, w in zip(tensors, (big, small), strict=True)]
    assert max(relative) < 0.12


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(INPUTS)), seed=seeds, scale=st.sampled_from([0.0, 1e-8, 1.0, 1e4]), dtype=dtypes)
def test_inputs_are_rounded_and_gradients_pass(name, seed, scale, dtype):
    spec, family = INPUTS[name], data_type(INPUTS[name].data_type)
    x = weight(seed, scale, 6, 64, dtype).view(2, 3, 64).requires_grad_()
    fixed = family.input_scale(x.abs().amax(), spec) if name in FIXED else None
    before = x.detach().clone()
    y = family.quantize_input(x, spec, fixed)
    assert torch.equal(x, before)
    assert y.dtype == dtype and y.shape == x.shape and torch.isfinite(y).all()
    # Beyond what a family can hold at these magnitudes: NVFP4's and FP8's fixed floors, float16's least value.
    if scale >= 1.0:
        bound = 0.3 if spec.bits == 4 else 0.07
        assert (y - x).abs().max() <= bound * x.abs().max()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_an_input_is_rounded_the_same_in_any_company(name, monkeypatch):
    """Rounding in parts is rounding of the whole, and of each token alone where scales are a token's own."""
    spec, family = INPUTS[name], data_type(INPUTS[name].data_type)
    x = weight(5, 1.0, 24, 64)
    fixed = family.input_scale(x.abs().amax(), spec) if name in FIXED else None
    whole = family.quantize_input(x, spec, fixed)
    monkeypatch.setattr("auto_round.data_type.inputs.CPU_PART", 128)
    assert torch.equal(family.quantize_input(x, spec, fixed), whole)
    assert torch.equal(torch.cat([family.quantize_input(row, spec, fixed) for row in x.split(1)]), whole)


def test_fixed_scales_are_what_files_hold():
    largest = torch.tensor(3.3)
    fp8 = data_type("fp").input_scale(largest, INPUTS["fp8_static"])
    assert fp8.shape == (1,) and fp8.dtype == torch.float32 and torch.equal(fp8, fp8.bfloat16().float())
    nv = data_type("nv_fp").input_scale(largest, INPUTS["nvfp4"])
    assert nv.shape == (1,) and nv.item() == 2 ** math.floor(math.log2(2688 / 3.3))
    assert data_type("nv_fp").input_scale(torch.tensor(0.0), INPUTS["nvfp4"]).item() == 1.0
    for spec in SPECS.values():
        if spec.data_type == "fp":
            scale = quantized(weight(2), spec).scale
            assert torch.equal(scale, scale.bfloat16().float())


def test_what_cannot_be_is_said():
    x = torch.ones(2, 32)
    with pytest.raises(ValueError, match="global scale"):
        data_type("nv_fp").quantize_input(x, INPUTS["nvfp4"], None)
    with pytest.raises(ValueError, match="act_dynamic"):
        data_type("mx_fp").input_scale(torch.tensor(1.0), SPECS["mxfp4"])
    with pytest.raises(ValueError, match="act_sym"):
        data_type("int").quantize_input(x, TensorSpec(8, -1, False), None)


PRESETS = {
    "mxfp4": ("MXFP4", "mxfp4", "mxfp4"),
    "mxfp8": ("MXFP8", "mxfp8", "mxfp8"),
    "nvfp4": ("NVFP4", "nvfp4", "nvfp4"),
    "fp8_token": ("FP8_DYNAMIC", "fp8_row", "fp8_token"),
    "fp8_static": ("FP8", "fp8_tensor", "fp8_static"),
    "int8": ("INT8", None, "int8"),
}


def _theirs(preset):
    schemes = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    return schemes.preset_name_to_scheme(preset, ["Linear"])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_weights_are_those_of_compressed_tensors(name):
    """Their fake quantization with our scales gives our weights, bit for bit, in float32."""
    preset, ours, _ = PRESETS[name]
    if ours is None:
        pytest.skip("integer weights have full-range symmetric scales of their own")
    args, spec, w = _theirs(preset).weights, SPECS[ours], weight(7)
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    tensor = quantized(w, spec)
    scale, overall = tensor.scale.float(), tensor.extra.get(GLOBAL)
    if spec.data_type == "mx_fp":
        scale = plain_scale(tensor)[:, ::32]
    theirs = fake_quantize(w, scale, torch.zeros_like(scale), args, overall)
    assert torch.equal(theirs, tensor.dequantize())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_inputs_are_those_of_compressed_tensors(name):
    """Their scales and rounding of an input, in float32, are ours; integers differ in their scale, amax / 127.5."""
    from_preset, _, ours = PRESETS[name]
    args, spec = _theirs(from_preset).input_activations, INPUTS[ours]
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

    family = data_type(spec.data_type)
    x = weight(9, 2.0, 48, 64).view(4, 12, 64)
    x[0, :, 16:32] *= 1e-6  # below the least scale of a block
    fixed = family.input_scale(x.abs().amax(), spec) if ours in FIXED else None
    found = family.quantize_input(x, spec, fixed)
    if ours == "fp8_static":
        scale = fixed
    elif ours == "int8":
        scale = x.abs().amax(-1, keepdim=True) / 127
    else:
        scale, _ = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), global_scale=fixed)
    theirs = fake_quantize(x, scale, torch.zeros_like(scale), args, fixed if ours == "nvfp4" else None)
    assert torch.equal(theirs, found)


def test_blocks_are_those_of_compressed_tensors():
    args = _theirs("FP8_BLOCK").weights
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    w = weight(11, rows=200, columns=304)
    tensor = quantized(w, dataclasses.replace(SPECS["fp8_block"], group_size=(128, 128)))
    assert tensor.scale.shape == (2, 3)
    theirs = fake_quantize(w, tensor.scale, torch.zeros_like(tensor.scale), args)
    assert torch.equal(theirs, tensor.dequantize())
