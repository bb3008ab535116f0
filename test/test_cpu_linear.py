"""Products of experts' tokens on a CPU: few different numbers of rows, and the values that they had without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from auto_round.calibration.cpu_linear import EvenRows, even


class Shapes(TorchDispatchMode):
    """Collects the shapes of what is multiplied."""

    def __init__(self):
        super().__init__()
        self.found: set[tuple] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.found.add(tuple(tuple(matrix.shape) for matrix in args[-2:]))
        return func(*args, **(kwargs or {}))


def product(rows: int, dtype: torch.dtype, bias: bool) -> list[torch.Tensor]:
    """Output, and gradients of all that goes in."""
    drawn = torch.Generator().manual_seed(rows)
    inputs = [torch.randn(shape, generator=drawn).to(dtype) for shape in ((rows, 16), (8, 16), (8,))][: 2 + bias]
    for tensor in inputs:
        tensor.requires_grad_()
    output = F.linear(*inputs)
    output.backward(torch.randn(output.shape, generator=drawn).to(dtype))
    return [output.detach(), *(tensor.grad for tensor in inputs)]


@pytest.mark.parametrize("bias", [False, True])
def test_values_stay(bias):
    for rows in (1, 7, 8, 100, 257):
        plain = product(rows, torch.bfloat16, bias)
        with EvenRows():
            filled = product(rows, torch.bfloat16, bias)
        for one, other in zip(plain, filled, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_few_shapes_are_multiplied():
    """Single precision, for which nothing is compiled, stays as it is; in autocast it is half precision."""
    counts = range(1, 301, 3)
    for dtype, numbers in ((torch.bfloat16, 26), (torch.float32, len(counts))):
        with EvenRows(), Shapes() as shapes:
            for rows in counts:
                product(rows, dtype, False)
        assert len(shapes.found) <= 3 * numbers and len(shapes.found) > 2 * numbers
    x, weight = torch.randn(33, 16), torch.randn(8, 16)
    with EvenRows(), torch.autocast("cpu", torch.bfloat16), Shapes() as shapes:
        assert F.linear(x, weight).shape == (33, 8)
    assert {one[0] for one, _ in shapes.found} == {40}


def test_even_adds_an_eighth_at_most():
    used = [even(rows) for rows in range(5000)]
    assert used == sorted(used) and used[0] == 0 and all(even(rows) == rows for rows in used)
    assert all(rows <= filled <= max(rows + 7, rows * 1.125) for rows, filled in enumerate(used))


def test_batches_and_empty_lists_stay():
    weight = torch.randn(8, 16).bfloat16()
    with EvenRows(), Shapes() as shapes:
        assert F.linear(torch.randn(3, 11, 16).bfloat16(), weight).shape == (3, 11, 8)
        assert F.linear(torch.empty(0, 16).bfloat16(), weight).shape == (0, 8)
    assert ((33, 16), (16, 8)) in shapes.found
