"""Small floating-point grids and the weights that live on them: rounding, codes, search of scales, tuning.

E2M1 and E4M3 (Open Compute Microscaling 1.0, sections 5.3.1 and 5.3.3) and MX's four-bit integers are one kind of grid:
evenly spaced below the smallest normal exponent, with a spacing that doubles at each power of two above it. So one
rounding routine serves the families `mxfp`, `nvfp` and `fp8`, which differ in how a scale is found and stored.

    code = RNE(w/s + V · unit), saturated        w' = s · code

V is the rounding offset that SignRound (arXiv 2309.05516) tunes. Its unit is the same for small and large elements, as
their errors count alike in what a layer puts out: on a trained model that leaves 8 to 20 % less error than offsets in
local steps. Scales are not tuned: next to a searched start, moving them on their coarse grids only did harm there.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from auto_round.data_type.base import QuantizedTensor, WeightTask, grouped
from auto_round.data_type.inputs import parts
from auto_round.schemes import GroupSize

EXPONENT_BITS = 0x7F800000
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_CODES = tuple(bisect.bisect_left(E2M1_VALUES, half / 2) for half in range(13))  # of 0, 0.5, 1, … 6


@dataclass(frozen=True)
class Grid:
    """Values ±0 … `largest` with `mantissa` bits after the leading one, evenly spaced below 2^min_exponent.

    unit: what a rounding offset of 1 means, measured in tuning (E2M1 0.5 to 1.6, E4M3 4 to 16, quarters 0.25 and 0.5).
    encode: float32 values on the grid → uint8 codes; decode: codes → float32 values.
    """

    largest: float
    mantissa: int
    min_exponent: int
    unit: float
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]

    def round_(self, x: torch.Tensor) -> torch.Tensor:
        """Round float32 `x` in place to the nearest grid point, ties to even codes, saturating.

        Adding 1.5 · 2^23 steps leaves float32 no bits below one step, so the addition itself rounds; a step is
        2^-mantissa of the power of two below the element.
        """
        magnitude = x.clamp_(-self.largest, self.largest).abs().clamp_(min=2.0**self.min_exponent)
        power = magnitude.view(torch.int32).bitwise_and_(EXPONENT_BITS).view(torch.float32)
        shift = power.mul_(1.5 * 2.0 ** (23 - self.mantissa))
        return x.add_(shift).sub_(shift)


def _encode_e2m1(values: torch.Tensor) -> torch.Tensor:
    table = torch.tensor(E2M1_CODES, dtype=torch.uint8, device=values.device)
    return table[(values.abs() * 2).int()].add_((values < 0).to(torch.uint8), alpha=8)


def _decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=codes.device)
    return table[codes.int()]


E2M1 = Grid(6.0, 1, 0, 0.7, _encode_e2m1, _decode_e2m1)
E4M3 = Grid(
    448.0,
    3,
    -6,
    8.0,
    lambda values: values.to(torch.float8_e4m3fn).view(torch.uint8),
    lambda codes: codes.view(torch.float8_e4m3fn).float(),
)
QUARTERS = Grid(
    1.75, 2, 0, 0.25, lambda values: (values * 4 + 8).to(torch.uint8), lambda codes: (codes.float() - 8).mul_(0.25)
)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """float32 → float8_e4m3fn, to nearest even, saturating (the plain cast makes NaN of what is too large)."""
    return x.clamp(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn)


def viewed(weight: torch.Tensor, group_size: GroupSize) -> torch.Tensor:
    """[out, in] as [out, groups, inputs per group]; as [block rows, outputs, block columns, inputs] for 2-D blocks.

    Ragged edges of blocks are padded with zeros.
    """
    if not isinstance(group_size, tuple):
        return grouped(weight, group_size)
    rows, columns = weight.shape
    high, wide = group_size
    if rows % high or columns % wide:
        weight = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))
    return weight.reshape(-(-rows // high), high, -(-columns // wide), wide)


def spread(scale: torch.Tensor, group_size: GroupSize) -> torch.Tensor:
    """A scale per group [a, b], shaped to broadcast over `viewed`."""
    return scale[:, None, :, None] if isinstance(group_size, tuple) else scale.unsqueeze(-1)


def restored(view: torch.Tensor, shape: torch.Size, group_size: GroupSize) -> torch.Tensor:
    """The inverse of `viewed`."""
    if not isinstance(group_size, tuple):
        return view.reshape(shape)
    a, b, c, d = view.shape
    return view.reshape(a * b, c * d)[: shape[0], : shape[1]].contiguous()


def largest_of(weight: torch.Tensor, group_size: GroupSize) -> torch.Tensor:
    """Largest magnitude of each group, float32 [a, b] like its scale."""
    view = viewed(weight, group_size)
    inner = (1, 3) if isinstance(group_size, tuple) else (-1,)
    return torch.cat([view[part].float().abs().amax(inner) for part in parts(view)])


def encode(weight: torch.Tensor, scale: torch.Tensor, value: torch.Tensor | None, grid: Grid, group_size: GroupSize):
    """Decide the codes, uint8 [out, in]: the only place that does. scale [a, b]; value like `viewed`, or None."""
    view, wide = viewed(weight, group_size), spread(scale, group_size)
    codes = torch.empty(view.shape, dtype=torch.uint8, device=weight.device)
    for part in parts(view):
        quotient = view[part].float() / wide[part]
        if value is not None:
            quotient.add_(value[part], alpha=grid.unit)
        codes[part] = grid.encode(grid.round_(quotient))
    return restored(codes, weight.shape, group_size)


def decode(codes: torch.Tensor, scale: torch.Tensor, grid: Grid, group_size: GroupSize) -> torch.Tensor:
    """float32 [out, in] weight `scale · code`."""
    view, wide = viewed(codes, group_size), spread(scale, group_size)
    out = torch.empty(view.shape, device=codes.device)
    for part in parts(view):
        out[part] = grid.decode(view[part]).mul_(wide[part])
    return restored(out, codes.shape, group_size)


def best_scale(task: WeightTask, grid: Grid, scales: Iterable[torch.Tensor]) -> torch.Tensor:
    """The scale [a, b] of each group, among candidates, of least Σ importance · (w' - w)²; the first wins ties."""
    size = task.spec.group_size
    view = viewed(task.weight, size)
    importance = _importance(task)
    inner = (1, 3) if isinstance(size, tuple) else (-1,)
    best = best_error = None
    for scale in scales:
        wide = spread(scale, size)
        error = torch.empty_like(scale)
        for part in parts(view):
            w = view[part].float()
            difference = grid.round_(w / wide[part]).mul_(wide[part]).sub_(w)
            error[part] = difference.square_().mul_(importance).sum(inner)
        if best is None:
            best, best_error = scale, error
            continue
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def _importance(task: WeightTask) -> torch.Tensor:
    """Importance of the inputs, shaped to broadcast over `viewed`; channels never seen still count a little."""
    weight = task.weight
    if task.importance is None:
        return torch.ones((), device=weight.device)
    importance = task.importance.to(weight.device).float()
    importance = importance.clamp(min=importance.mean() * 1e-4 + 1e-12)
    if task.spec.group_size == 0:
        return importance.repeat(weight.shape[0])
    if isinstance(task.spec.group_size, tuple):
        return viewed(importance.unsqueeze(0), (1, task.spec.group_size[1]))
    return viewed(importance.unsqueeze(0), task.spec.group_size)


class TunableFloat:
    """A weight under tuning: rounding offsets `value`, shaped as `viewed`, that start at 0; scales [a, b] are fixed."""

    def __init__(
        self,
        task: WeightTask,
        grid: Grid,
        scale: torch.Tensor,
        build: Callable[[torch.Tensor, torch.Tensor], QuantizedTensor],
    ):
        """build: (uint8 codes [out, in], scale [a, b]) → the quantized tensor."""
        self.size = task.spec.group_size
        self.shape = task.weight.shape
        self.weight = viewed(task.weight.detach(), self.size)
        self.grid, self.scale, self.build = grid, scale, build
        self.value = torch.zeros(self.weight.shape, device=scale.device, requires_grad=True)

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """What the optimizer moves."""
        return {"value": self.value}

    def fake_quantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The quantized weight [out, in] in `dtype`, with gradients for `value`."""
        view = _FakeQuantize.apply(self.weight, self.value, spread(self.scale, self.size), self.grid, dtype)
        return restored(view, self.shape, self.size)

    def reset(self) -> None:
        """Back to the starting point."""
        self.value.data.zero_()

    @torch.no_grad()
    def finish(self) -> QuantizedTensor:
        weight = restored(self.weight, self.shape, self.size)
        return self.build(encode(weight, self.scale, self.value, self.grid, self.size), self.scale)


class _FakeQuantize(torch.autograd.Function):
    """w' = s · code of a viewed weight, in parts that stay in the cache, with the backward written out.

    Only a byte per weight is kept: whether it is inside the grid. Saturation stops gradients, rounding passes them.
    """

    @staticmethod
    def forward(ctx, weight, value, scale, grid, dtype):
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        inside = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        for part in parts(weight):
            quotient = (weight[part].float() / scale[part]).add_(value[part], alpha=grid.unit)
            torch.le(quotient.abs(), grid.largest, out=inside[part])
            out[part] = grid.round_(quotient).mul_(scale[part])
        ctx.save_for_backward(scale, inside)
        ctx.unit = grid.unit
        return out

    @staticmethod
    def backward(ctx, grad):
        scale, inside = ctx.saved_tensors
        grad_value = torch.empty(inside.shape, device=grad.device)
        for part in parts(inside):
            torch.mul(grad[part], inside[part], out=grad_value[part]).mul_(scale[part] * ctx.unit)
        return None, grad_value, None, None, None
