"""Integer weights: formulas against a plain re-statement, and what must hold for any weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.data_type.base import QuantizedTensor, grouped
from auto_round.data_type.int import FAVOUR_LARGE, Tunable, finish, start_point
from auto_round.schemes import TensorSpec

specs = st.builds(
    TensorSpec, bits=st.integers(2, 8), group_size=st.sampled_from([-1, 0, 16, 32, 64]), sym=st.booleans()
)


def weight(seed: int, scale: float = 0.02, rows: int = 32, columns: int = 64) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def plain_rtn(w: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The formulas of the documentation, group by group, without any cleverness."""
    rows, columns = w.shape
    if spec.group_size == 0:
        return plain_rtn(w.reshape(1, -1), TensorSpec(spec.bits, -1, spec.sym)).reshape(rows, columns)
    size = columns if spec.group_size == -1 else spec.group_size
    out = torch.empty(rows, columns)
    for row in range(rows):
        for begin in range(0, columns, size):
            group = w[row, begin : begin + size].float()
            low, high = min(group.min().item(), 0.0), max(group.max().item(), 0.0)
            if spec.sym:
                half = 2 ** (spec.bits - 1)
                step = -low if -low > high else -high
                scale = torch.tensor(step / half)
                scale = torch.where(scale < 0, scale.clamp(max=-1e-5), scale.clamp(min=1e-5)).half().float()
                codes = torch.clamp(torch.round(group / scale), -half, half - 1)
            else:
                levels = 2**spec.bits - 1
                scale = torch.tensor((high - low) / levels).clamp(min=1e-5).half().float()
                zero = torch.round(-low / scale)
                codes = torch.clamp(torch.round(group / scale) + zero, 0, levels) - zero
            out[row, begin : begin + size] = codes * scale
    return out


@settings(max_examples=40, deadline=None)
@given(spec=specs, seed=st.integers(0, 1000), scale=st.sampled_from([1e-7, 0.02, 3.0]))
def test_rtn_is_the_formula(spec, seed, scale):
    w = weight(seed, scale, rows=4)
    tensor = finish(w, *start_point(w, spec, None, False), None, spec)
    assert torch.allclose(tensor.dequantize(), plain_rtn(w, spec), rtol=1e-6, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(spec=specs, seed=st.integers(0, 1000), offset=st.floats(-0.5, 0.5))
def test_what_the_loss_sees_is_what_is_stored(spec, seed, offset):
    w = weight(seed)
    tunable = Tunable(w, spec, *start_point(w, spec, None, True))
    with torch.no_grad():
        tunable.value.add_(offset)
        tunable.clip.mul_(0.9)
    assert torch.equal(tunable.fake_quantize(torch.float32), tunable.finish().dequantize())


@settings(max_examples=25, deadline=None)
@given(spec=specs, seed=st.integers(0, 1000))
def test_searched_scales_are_never_worse(spec, seed):
    w, importance = weight(seed), torch.rand(64, generator=torch.Generator().manual_seed(seed)) + 0.1
    groups = grouped(w.float(), spec.group_size)
    favour = (groups.square().mean(-1, keepdim=True) + groups.square()).sqrt().view(w.shape)
    favour = favour if spec.bits <= FAVOUR_LARGE else torch.ones_like(favour)
    errors = []
    for search in (False, True):
        tensor = finish(w, *start_point(w, spec, importance, search), None, spec)
        errors.append(((tensor.dequantize() - w.float()).square() * importance * favour).sum().item())
    assert errors[1] <= errors[0] * (1 + 1e-6)


@pytest.mark.parametrize("sym", [True, False])
def test_gradients_of_the_fused_step(sym):
    """The written-out backward equals autograd on the same expression with straight-through rounding."""
    spec = TensorSpec(3, 16, sym)
    w = weight(1).float()
    tunable = Tunable(w, spec, *start_point(w, spec, None, False))
    with torch.no_grad():
        tunable.value.copy_(torch.rand(tunable.value.shape) - 0.5)
        tunable.clip.mul_(0.8)
    upstream = torch.randn(w.shape)
    tunable.fake_quantize(torch.float32).backward(upstream)
    value = tunable.value.detach().clone().requires_grad_()
    clip = tunable.clip.detach().clone().requires_grad_()
    expected = _autograd(w, spec, tunable, value, clip)
    expected.backward(upstream)
    assert torch.allclose(tunable.value.grad, value.grad, atol=1e-6)
    assert torch.allclose(tunable.clip.grad, clip.grad, rtol=1e-3, atol=1e-4)


def _autograd(w, spec, tunable, value, clip):
    def ste(x, y):
        return x + (y - x).detach()

    groups, levels = w.view(w.shape[0], -1, spec.group_size), 2**spec.bits - 1
    if spec.sym:
        raw, zero = tunable.start_scale * clip[0], torch.tensor(float(2 ** (spec.bits - 1)))
        scale = ste(raw, raw.half().float())
    else:
        low = -tunable.start_zero * tunable.start_scale * clip[0]
        high = (levels - tunable.start_zero) * tunable.start_scale * clip[1]
        raw = (high - low) / levels
        scale = ste(raw, raw.half().float())
        zero = ste(-low / scale, (-low / scale).round()).clamp(0, levels).unsqueeze(-1)
    quotient = groups / tunable.start_scale.unsqueeze(-1) + value  # the grid stays where it started
    codes = (ste(quotient, quotient.round()) + zero).clamp(0, levels)
    return ((codes - zero) * scale.unsqueeze(-1)).view(w.shape)


def test_zero_groups_and_wide_ranges():
    w = torch.zeros(2, 32)
    w[1] = 3e4
    for sym in (True, False):
        spec = TensorSpec(4, 16, sym)
        tensor = finish(w, *start_point(w, spec, None, True), None, spec)
        assert torch.equal(tensor.dequantize()[0], w[0])
        assert torch.isfinite(tensor.dequantize()).all()


def test_invariants_are_checked():
    codes = torch.zeros(4, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="does not fit"):
        QuantizedTensor(codes, torch.ones(3, 2).half(), None, TensorSpec(4, 16, True))
    with pytest.raises(ValueError, match="zero point"):
        QuantizedTensor(codes, torch.ones(4, 2).half(), None, TensorSpec(4, 16, False))
