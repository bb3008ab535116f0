"""llama.cpp's numbers: the gguf package reads our bytes as we do, and what must hold for any weight."""

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.data_type import data_type
from auto_round.data_type.base import QuantizedTensor, WeightTask
from auto_round.data_type.int import FAVOUR_LARGE
from auto_round.formats.gguf_blocks import BLOCKS, gguf_type, pack, row_bytes, unpack
from auto_round.schemes import GGUF_TYPES, TensorSpec

FAMILIES = [kind for kind, scheme in GGUF_TYPES.items() if scheme.data_type != "int"]


def weight(seed: int, scale: float = 0.02, rows: int = 4, columns: int = 512) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def importance(seed: int, columns: int = 512) -> torch.Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(seed)) ** 2 + 0.01


def quantized(w: torch.Tensor, kind: str, **known) -> QuantizedTensor:
    spec = GGUF_TYPES[kind].weight
    return data_type(spec.data_type).quantize(WeightTask(w, spec, **known))


def tunable(w: torch.Tensor, kind: str, **known):
    spec = GGUF_TYPES[kind].weight
    return data_type(spec.data_type).tunable(WeightTask(w, spec, **known))


def read_by_gguf(packed: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind]))


def any_bytes(kind: str, seed: int, rows: int, columns: int) -> torch.Tensor:
    """Rows of random structs whose half precision numbers are finite."""
    random = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows, row_bytes(kind, columns)), dtype=torch.uint8, generator=random)
    block, begin = BLOCKS[kind], 0
    structs = packed.view(rows, columns // block.weights, -1)
    for member, size in zip(block.members, block.sizes(), strict=True):
        if member in ("d", "dmin", "min"):
            number = torch.randn(structs.shape[:2], generator=random).half().unsqueeze(-1)
            structs[..., begin : begin + size] = number.view(torch.uint8)
        begin += size
    return packed


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(GGUF_TYPES)),
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 3),
)
def test_the_gguf_package_reads_what_we_read(kind, seed, rows, blocks):
    columns = blocks * BLOCKS[kind].weights
    packed = any_bytes(kind, seed, rows, columns)
    tensor = unpack(packed, kind, columns)
    assert torch.equal(pack(tensor), packed)
    assert torch.equal(tensor.dequantize().view(torch.int32), read_by_gguf(packed, kind).view(torch.int32))
    assert int(tensor.codes.max()) < 1 << tensor.spec.bits


@pytest.mark.parametrize("kind", sorted(GGUF_TYPES))
def test_types_and_sizes(kind):
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert row_bytes(kind, BLOCKS[kind].weights) == size
    assert gguf_type(GGUF_TYPES[kind].weight) == kind
    with pytest.raises(ValueError, match="no multiple"):
        row_bytes(kind, BLOCKS[kind].weights + 16)


def test_chunks_of_rows_are_joined():
    w = weight(3, rows=1100)
    tensor = quantized(w, "Q4_K")
    assert torch.equal(pack(tensor)[1050:], pack(quantized(w[1050:], "Q4_K")))
    assert torch.equal(unpack(pack(tensor), "Q4_K", 512).codes, tensor.codes)


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="start from one of GGUF:Q4_0"):
        gguf_type(TensorSpec(4, 128, True))
    with pytest.raises(ValueError, match="cut off"):
        unpack(torch.zeros(2, 143, dtype=torch.uint8), "Q4_K", 256)
    with pytest.raises(ValueError, match="blocks of 32"):
        quantized(weight(0, columns=288), "Q4_K")


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(GGUF_TYPES)),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-4, 0.02, 3.0]),
    search=st.booleans(),
)
def test_quantized_weights_survive_the_file(kind, seed, scale, search):
    w = weight(seed, scale)
    tensor = quantized(w, kind, importance=importance(seed), search=search)
    packed = pack(tensor)
    assert torch.equal(read_by_gguf(packed, kind), tensor.dequantize())
    assert torch.equal(pack(unpack(packed, kind, 512)), packed)
    error = (tensor.dequantize() - w.float()).norm() / w.float().norm()
    assert error < {2: 0.5, 3: 0.25, 4: 0.12, 5: 0.06, 6: 0.03, 8: 0.02}[tensor.spec.bits] * (3 if scale < 1e-3 else 1)


def favoured(w: torch.Tensor, kind: str) -> torch.Tensor:
    """What the search favours, by the formula of the documentation, super-block by super-block."""
    if GGUF_TYPES[kind].bits > FAVOUR_LARGE:
        return torch.ones_like(w)
    blocks = w.view(w.shape[0], -1, BLOCKS[kind].weights)
    return (2 * blocks.square().mean(-1, keepdim=True) + blocks.square()).sqrt().view(w.shape)


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(FAMILIES), seed=st.integers(0, 1000))
def test_searched_scales_are_better(kind, seed):
    w, channels = weight(seed), importance(seed)
    favour = favoured(w.float(), kind)
    errors = [
        ((quantized(w, kind, importance=channels, search=search).dequantize() - w.float()).square() * channels * favour)
        .sum()
        .item()
        for search in (False, True)
    ]
    assert errors[1] < errors[0] * 0.95


# Relative error sqrt(Σh(w'-w)²/Σhw²) that llama.cpp's quantizer leaves (libggml-base 0.25.3, imatrix) on the weight
# and importance of the test.
LLAMA_CPP = {
    "Q4_0": 0.07796,
    "Q4_1": 0.06535,
    "Q5_0": 0.03852,
    "Q5_1": 0.03171,
    "Q8_0": 0.00529,
    "Q2_K": 0.24192,
    "Q3_K": 0.13526,
    "Q4_K": 0.06638,
    "Q5_K": 0.03369,
    "Q6_K": 0.01639,
}


@pytest.mark.parametrize("kind", LLAMA_CPP)
def test_no_worse_than_llama_cpp(kind):
    w, channels = weight(0, rows=64), importance(0)
    off = (quantized(w, kind, importance=channels, search=True).dequantize() - w.float()).square()
    assert ((off * channels).sum() / (w.float().square() * channels).sum()).sqrt() < LLAMA_CPP[kind] * 1.001


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(FAMILIES), seed=st.integers(0, 1000), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_what_the_loss_sees_is_what_is_stored(kind, seed, dtype):
    w, dtype = weight(seed), getattr(torch, dtype)
    tuned = tunable(w, kind, importance=importance(seed), search=True)
    start = quantized(w, kind, importance=importance(seed), search=True)
    assert torch.equal(tuned.finish().dequantize(), start.dequantize())
    assert torch.equal(tuned.fake_quantize(dtype), start.dequantize(dtype))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tuned.value.add_(torch.rand(tuned.value.shape, generator=random) - 0.5)
        tuned.clip.mul_(0.8 + 0.4 * torch.rand(tuned.clip.shape, generator=random))
    assert torch.equal(tuned.fake_quantize(dtype), tuned.finish().dequantize(dtype))
    assert not torch.equal(tuned.finish().dequantize(), start.dequantize())
    assert torch.equal(read_by_gguf(pack(tuned.finish()), kind), tuned.finish().dequantize())
    tuned.reset()
    assert torch.equal(tuned.finish().dequantize(), start.dequantize())


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradients_of_the_fused_step(kind):
    """The written-out backward equals autograd on the same expression with straight-through rounding."""
    w = weight(1).float()
    tuned = tunable(w, kind, search=True)
    tuned.clip.requires_grad_(True)
    with torch.no_grad():
        tuned.value.add_(torch.rand(tuned.value.shape) - 0.5)
        tuned.clip.mul_(0.8)
    upstream = torch.randn(w.shape)
    tuned.fake_quantize(torch.float32).backward(upstream)
    value, clip = (tuned.parameters[name].detach().clone().requires_grad_() for name in ("value", "clip"))
    _by_autograd(w, tuned, value, clip).backward(upstream)
    assert torch.allclose(tuned.value.grad, value.grad, atol=1e-6)
    assert torch.allclose(tuned.clip.grad, clip.grad, rtol=1e-3, atol=1e-4)


def _by_autograd(w, tuned, value, clip):
    def through(x, y):
        return x + (y - x).detach()

    stored, start = tuned.scales().decoded(), tuned.start.decoded()
    levels = (1 << tuned.spec.bits) - 1
    if stored[1] is None:
        s, m = through(start[0] * clip[0], stored[0]).unsqueeze(-1), 0.0
    else:
        low, high = -start[1] * clip[0], (levels * start[0] - start[1]) * clip[1]
        s, m = through((high - low) / levels, stored[0]).unsqueeze(-1), through(-low, stored[1]).unsqueeze(-1)
    shift = 0.0 if start[1] is None else start[1].unsqueeze(-1)  # the grid stays where it started
    quotient = (w.view(tuned.value.shape) + shift) / start[0].unsqueeze(-1) + value
    lowest = -(1 << (tuned.spec.bits - 1)) if tuned.spec.sym else 0
    return (through(quotient, quotient.round()).clamp(lowest, lowest + levels) * s - m).view(w.shape)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("search", [False, True])
def test_zeros_outliers_and_dead_channels(kind, search):
    w = weight(0).float()
    w[0] = 0.0
    w[1, :256] = 0.0
    w[2] = 3e4
    channels = importance(0)
    channels[::3] = 0.0
    tensor = quantized(w, kind, importance=channels, search=search)
    values = tensor.dequantize()
    assert torch.equal(values[0], w[0])
    assert torch.isfinite(values).all()
    assert np.isfinite(read_by_gguf(pack(tensor), kind).numpy()).all()
    assert (values[2] - w[2]).abs().max() < 3e3


def test_what_the_optimizer_moves():
    assert set(tunable(weight(0), "Q2_K").parameters) == {"value", "clip"}
    assert set(tunable(weight(0), "Q2_K", tune_clip=False).parameters) == {"value"}
    assert set(tunable(weight(0), "Q4_K").parameters) == {"value"}
