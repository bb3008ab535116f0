"""Attention by slices gives what PyTorch's own gives, forward and backward, and leaves alone what it cannot serve."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.calibration import cpu_attention
from auto_round.calibration.cpu_attention import QuickAttention


def tensors(batch, heads, groups, queries, keys, channels=16, dtype=torch.bfloat16):
    torch.manual_seed(queries * keys + heads)
    common = 2 * torch.randn(1, groups, 1, channels)  # what the keys of a real model share
    made = (
        torch.randn(batch, heads, queries, channels),
        torch.randn(batch, groups, keys, channels) + common,
        torch.randn(batch, groups, keys, channels),
    )
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def both(inputs, **kwargs):
    """(exact, PyTorch's, ours): output and gradients of each."""
    torch.manual_seed(0)
    gradient = torch.randn(inputs[0].shape[:-1] + inputs[2].shape[-1:])
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    found = []
    for given_, mode in ((exact, False), (inputs, False), (inputs, True)):
        if mode:
            with QuickAttention():
                output = F.scaled_dot_product_attention(*given_, **kwargs)
        else:
            output = F.scaled_dot_product_attention(*given_, **kwargs)
        found.append([output, *torch.autograd.grad(output, given_, gradient.to(output.dtype))])
    return found


def error(got, want):
    return ((got.float() - want).norm() / want.norm().clamp(min=1e-6)).item()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40),
    st.sampled_from(["none", "causal", "bool", "float"]), st.sampled_from([None, 0.3]),
)  # fmt: skip
def test_is_as_close_as_the_kernel(batch, groups, sharing, queries, keys, kind, scale):
    keys = queries if kind == "causal" else keys
    inputs = tensors(batch, groups * sharing, groups, queries, keys)
    kwargs = {"scale": scale, "enable_gqa": True, "is_causal": kind == "causal"}
    if kind in ("bool", "float"):
        mask = torch.rand(batch, 1, queries, keys) < 0.6
        mask[..., 0] = True
        kwargs["attn_mask"] = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -1e9).bfloat16()
    if kind == "float":  # PyTorch wants the mask in the dtype of the query
        exact = [t.detach().float().requires_grad_() for t in inputs]
        want = F.scaled_dot_product_attention(*exact, **{**kwargs, "attn_mask": kwargs["attn_mask"].float()})
        with QuickAttention():
            assert error(F.scaled_dot_product_attention(*inputs, **kwargs), want) < 0.02
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "SLICE", 16)
        exact, _, ours = both(inputs, **kwargs)
    assert error(ours[0], exact[0]) < 0.02
    for name, got, want in zip(("query", "key", "value"), ours[1:], exact[1:], strict=True):
        assert (got.float() - want).norm() <= 0.03 * want.norm() + 0.02, name


def test_long_sequences_are_as_exact_as_the_kernel():
    exact, kernel, ours = both(tensors(1, 4, 2, 700, 700, 64), is_causal=True, enable_gqa=True)
    for want, theirs, mine in zip(exact, kernel, ours, strict=True):
        assert error(mine, want) < max(0.006, 1.5 * error(theirs, want))


def test_it_is_used_and_inputs_stay_as_they_are(monkeypatch):
    inputs, calls = tensors(1, 2, 2, 8, 8), []
    forward = cpu_attention._Attention.forward
    monkeypatch.setattr(cpu_attention._Attention, "forward", lambda *a: calls.append(1) or forward(*a))
    before = [tensor.detach().clone() for tensor in inputs]
    with QuickAttention():
        F.scaled_dot_product_attention(*inputs, is_causal=True)
    assert calls and all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        ({"dtype": torch.float32}, {}),
        ({}, {"dropout_p": 0.5}),
        ({"keys": 5}, {"is_causal": True}),
        ({}, {"attn_mask": torch.zeros(8, 8, dtype=torch.bool).fill_diagonal_(True)}),
        ({}, {"attn_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(-1)}),
        ({}, {"attn_mask": torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16, requires_grad=True)}),
    ],
    ids=["float32", "dropout", "not square", "flat mask", "hidden row", "learned mask"],
)
def test_what_it_cannot_serve_goes_on(shape, kwargs, monkeypatch):
    monkeypatch.setattr(cpu_attention._Attention, "apply", lambda *args: pytest.fail("served"))
    inputs = tensors(**{"batch": 1, "heads": 2, "groups": 2, "queries": 8, "keys": 8, **shape})
    with QuickAttention():
        torch.manual_seed(0)
        got = F.scaled_dot_product_attention(*inputs, **kwargs)
    torch.manual_seed(0)
    assert (
        torch.equal(
            got,
            F.scaled_dot_product_attention(*inputs, **kwargs),
        )
        or got.isnan().any()
    )
