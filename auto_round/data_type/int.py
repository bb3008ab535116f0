"""Integer weights: symmetric over the full signed range, and asymmetric with an integer zero point.

Formulas, per group of inputs that share a scale (w: weights, V: rounding offset tuned by SignRound, arXiv 2309.05516,
RNE: round half to even, M = 2^(bits-1)):

    symmetric    code = clamp(RNE(w/s + V) + M, 0, 2M-1)           zero = M
    asymmetric   code = clamp(RNE(w/s + V) + zero, 0, 2^bits - 1)
    both         w'   = s · (code - zero)

While a weight is tuned, the grid on which it is rounded keeps the scale that it started with, and only the last line
follows the tuned scale: a scale that moves then does not carry weights over to other codes, which is left to V
(LSQ, arXiv 1902.08153, divides by the scale that it trains; on a trained model the KL divergence after 100 signed
steps is 7 % lower so at 2 bits, 12 % at 4).

The scale is rounded to float16, the dtype it is stored in, before it divides the weight, so what the tuning loss sees
is what a reader of the file gets.

Activations are symmetric over ±(M-1): s = max|x| / (M-1), code = RNE(x/s), as vLLM's int8 kernels have it.
"""

from __future__ import annotations

import dataclasses

import torch

from auto_round.data_type.base import QuantizedTensor, WeightTask, grouped
from auto_round.data_type.inputs import StraightThrough, largest_in, round_input
from auto_round.schemes import TensorSpec

SCALE_DTYPE = torch.float16
MIN_SCALE = 1e-5  # keeps the quotient finite in float16 for groups of zeros
MAX_SCALE = 6.0e4  # below float16's largest value
SEARCH_STEPS = 32
FINE_STEPS = 8  # from FINE_BITS on: the best range is close to min/max, and gains little
FINE_BITS = 7
SEARCH_REFITS = 3
FAVOUR_LARGE = 3  # bits up to which the search favours large weights
MIN_INPUT = 1e-10  # stands for the largest input of a token of zeros
CHUNK = 1 << 18  # weights handled at once: scratch memory stays small, and in the cache


def store_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round a float32 scale to what is stored (float16, at least MIN_SCALE in magnitude, sign kept), as float32."""
    magnitude = scale.abs().clamp(MIN_SCALE, MAX_SCALE)
    return torch.where(scale < 0, -magnitude, magnitude).to(SCALE_DTYPE).float()


def minmax_range(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, high) per group, zero always inside: low ≤ 0 ≤ high. `w` is grouped, [..., inputs per group]."""
    return w.amin(-1).float().clamp(max=0), w.amax(-1).float().clamp(min=0)


def scale_from_range(
    low: torch.Tensor, high: torch.Tensor, spec: TensorSpec
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Unrounded scale, and unrounded zero point (None when symmetric), of a range per group.

    Symmetric: the end of larger magnitude gets the code -M, so the scale is negative when that end is positive.
    """
    if spec.sym:
        half = float(1 << (spec.bits - 1))
        return torch.where(-low > high, -low, -high) / half, None
    levels = float((1 << spec.bits) - 1)
    scale = (high - low) / levels
    return scale, -low / scale.clamp(min=MIN_SCALE)


def round_codes(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float, value: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """float32 codes 0 … 2^bits-1 of grouped weights; `scale` and `zero` [...] broadcast over the group."""
    quotient = w.float() / scale.unsqueeze(-1)
    if value is not None:
        quotient += value
    codes = quotient.round_()
    codes += zero.unsqueeze(-1) if isinstance(zero, torch.Tensor) else zero
    return codes.clamp_(0, (1 << bits) - 1)


def finish(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    value: torch.Tensor | None,
    spec: TensorSpec,
    grid: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Decide the codes: the only place that turns weights into a `QuantizedTensor`.

    weight [out, in]; scale and zero [out, groups] (or [1, 1]) as `store_scale` left them; value grouped or None.
    grid: the scale by which weights are divided, where it is not the one that is stored.
    """
    grid = scale if grid is None else grid
    groups = grouped(weight, spec.group_size)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    rows = max(1, CHUNK // groups[0].numel())
    for begin in range(0, len(groups), rows):
        part = slice(begin, begin + rows)
        offset = float(1 << (spec.bits - 1)) if zero is None else zero[part]
        codes[part] = round_codes(groups[part], grid[part], offset, None if value is None else value[part], spec.bits)
    return QuantizedTensor(
        codes.view(weight.shape), scale.to(SCALE_DTYPE), None if zero is None else zero.to(torch.uint8), spec
    )


def quantize(task: WeightTask) -> QuantizedTensor:
    """Round to nearest."""
    scale, zero = start_point(task.weight, task.spec, task.importance, task.search)
    return finish(task.weight, scale, zero, None, task.spec)


def tunable(task: WeightTask) -> TunableInt:
    """The weight under tuning."""
    scale, zero = start_point(task.weight, task.spec, task.importance, task.search)
    return TunableInt(task.weight, task.spec, scale, zero, task.tune_clip)


def dequantize(tensor: QuantizedTensor) -> torch.Tensor:
    """float32 [out, in] weight `scale * (code - zero_point)`."""
    rows, columns = tensor.codes.shape
    groups = tensor.codes.view(rows, tensor.scale.shape[1], -1).float()
    if tensor.zero_point is None:
        groups = groups - float(1 << (tensor.spec.bits - 1))
    else:
        groups = groups - tensor.zero_point.float().unsqueeze(-1)
    return (groups * tensor.scale.float().unsqueeze(-1)).view(rows, columns)


def rescaled(tensor: QuantizedTensor, factor: torch.Tensor) -> QuantizedTensor:
    """The same codes with scales multiplied by factors of their shape, as they are stored then."""
    scale = store_scale(tensor.scale.float() * factor.to(tensor.scale.device))
    return dataclasses.replace(tensor, scale=scale.to(SCALE_DTYPE))


def input_scale(largest: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """float32 [1]: the fixed scale of inputs up to this magnitude."""
    return largest.detach().float().reshape(1).clamp(min=MIN_INPUT) / ((1 << (spec.bits - 1)) - 1)


def quantize_input(x: torch.Tensor, spec: TensorSpec, input_scale: torch.Tensor | None) -> torch.Tensor:
    """`x` [..., in] as an engine rounds it, in its dtype; gradients pass straight through.

    Raises:
        ValueError: an asymmetric scheme, which no engine runs.
    """
    if not spec.sym:
        raise ValueError("integer activations are symmetric in every engine: use act_sym=True")
    most = (1 << (spec.bits - 1)) - 1

    def round_groups(groups: torch.Tensor) -> torch.Tensor:
        if input_scale is not None:
            return groups.div_(input_scale).round_().clamp_(-most - 1, most).mul_(input_scale)
        largest = largest_in(groups).clamp_(min=MIN_INPUT)
        # No value exceeds its own group's largest, so nothing is clamped; kernels multiply by this quotient.
        return groups.mul_(most / largest).round_().mul_(largest / most)

    # A given scale needs no view of the whole tensor.
    return round_input(x, -1 if input_scale is not None else spec.group_size, round_groups)


def start_point(
    weight: torch.Tensor, spec: TensorSpec, importance: torch.Tensor | None, search: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stored scale (float32 values) and zero point per group: from min/max, or searched for the least weighted error.

    weight [out, in]; importance [in], mean square of each input channel (None: all alike).
    """
    groups = grouped(weight, spec.group_size)
    rows = max(1, CHUNK // groups[0].numel())
    if not search:
        return _joined([_minmax_start(part, spec) for part in groups.split(rows)])
    if importance is None:
        importance = torch.ones(weight.shape[1], device=weight.device)
    importance = importance.float().clamp(min=importance.float().mean() * 1e-4 + 1e-12)
    if spec.group_size == 0:
        weights = importance.repeat(weight.shape[0]).view(1, 1, -1)
        return search_scale(groups, weights, spec)
    weights = grouped(importance.unsqueeze(0), spec.group_size)  # [1, groups, inputs per group]
    return _joined([search_scale(part, weights, spec) for part in groups.split(rows)])


def _joined(parts: list[tuple[torch.Tensor, torch.Tensor | None]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points of consecutive rows as one pair."""
    scales, zeros = zip(*parts, strict=True)
    return torch.cat(scales), None if zeros[0] is None else torch.cat(zeros)


def _minmax_start(groups: torch.Tensor, spec: TensorSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _shrunk(*minmax_range(groups), spec)


def search_scale(
    groups: torch.Tensor, importance: torch.Tensor, spec: TensorSpec
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale (and zero) per group that minimises Σ importance · (w' - w)².

    Up to FAVOUR_LARGE bits the importance is multiplied by sqrt(mean w² + w²), as llama.cpp's k-quants do: on a
    trained model this lowers the KL divergence at 2 and 3 bits (groups of 64 at 2 bits: 0.119 to 0.106), not at 4.

    Tries ranges shrunk and grown around min/max (see `_best_factor`); the best is refitted by weighted least squares
    for its codes (s = Σhwq / Σhq²), rounded to float16 and scored as it will be stored, against min/max.
    groups [rows, groups, inputs per group].
    """
    w = groups.float()
    if spec.bits <= FAVOUR_LARGE:
        importance = importance * (w.square().mean(-1, keepdim=True) + w.square()).sqrt()
    low, high = minmax_range(w)
    best_scale, best_zero = _minmax_start(groups, spec)
    best = _weighted_error(w, importance, best_scale, best_zero, spec)
    factor = _best_factor(w, importance, low, high, spec)
    scale, zero = _shrunk(low * factor, high * factor, spec)
    for _ in range(SEARCH_REFITS):
        scale = _refit(w, importance, scale, zero, spec)
        error = _weighted_error(w, importance, scale, zero, spec)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _best_factor(
    w: torch.Tensor, importance: torch.Tensor, low: torch.Tensor, high: torch.Tensor, spec: TensorSpec
) -> torch.Tensor:
    """By how much to shrink or grow each group's range.

    For given codes q the best scale leaves Σhw² - (Σhwq)² / Σhq², so the codes of each factor are judged by the last
    term alone, without a pass for the error itself.
    """
    weighted = importance * w
    most, found = torch.zeros_like(low), torch.ones_like(low)
    levels, half = (1 << spec.bits) - 1, 1 << (spec.bits - 1)
    span, steps = ((0.35, 1.15), SEARCH_STEPS) if spec.bits < FINE_BITS else ((0.93, 1.07), FINE_STEPS)
    for factor in torch.linspace(*span, steps).tolist():
        scale, zero = _shrunk(low * factor, high * factor, spec)
        codes = (w * scale.reciprocal().unsqueeze(-1)).round_()
        if zero is None:
            codes.clamp_(-half, half - 1)
        else:
            codes = codes.maximum(-zero.unsqueeze(-1)).minimum((levels - zero).unsqueeze(-1))
        top = (weighted * codes).sum(-1)
        gain = top.square() / codes.square_().mul_(importance).sum(-1).clamp_(min=1e-30)
        better = (gain > most) & (top * scale > 0)  # a scale of the other sign is no refit of this one
        most = torch.where(better, gain, most)
        found = torch.where(better, factor, found)
    return found


def _shrunk(low: torch.Tensor, high: torch.Tensor, spec: TensorSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stored scale and zero point of a range that need not hold all weights."""
    raw, zero = scale_from_range(low, high, spec)
    scale = store_scale(raw)
    return scale, None if zero is None else (-low / scale).round().clamp(0, (1 << spec.bits) - 1)


def _centred_codes(w, scale, zero, spec):
    offset = float(1 << (spec.bits - 1)) if zero is None else zero
    codes = round_codes(w, scale, offset, None, spec.bits)
    return codes - (offset if zero is None else zero.unsqueeze(-1))


def _weighted_error(w, importance, scale, zero, spec):
    difference = _centred_codes(w, scale, zero, spec).mul_(scale.unsqueeze(-1)).sub_(w)
    return difference.square_().mul_(importance).sum(-1)


def _refit(w, importance, scale, zero, spec):
    """Least-squares scale for the codes that `scale` gives; unchanged where all codes are zero."""
    codes = _centred_codes(w, scale, zero, spec)
    weighted = codes * importance
    top, bottom = (weighted * w).sum(-1), (weighted * codes).sum(-1)
    return store_scale(torch.where(bottom > 0, top / bottom.clamp(min=1e-30), scale))


class TunableInt:
    """A weight under tuning: rounding offsets V, and per group how far the range is clipped.

    `value` [out, groups, inputs per group] starts at 0. `clip` scales the starting range and starts at 1: one factor
    per group for symmetric weights ([1, out, groups]), one for each end for asymmetric ([2, out, groups]).
    """

    CLIP_BOUNDS = (0.3, 2.0)

    def __init__(
        self,
        weight: torch.Tensor,
        spec: TensorSpec,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        tune_clip: bool = True,
    ):
        self.spec = spec
        self.shape = weight.shape
        self.weight = grouped(weight.detach(), spec.group_size)
        self.start_scale = scale
        self.start_zero = zero
        self.value = torch.zeros(self.weight.shape, dtype=torch.float32, device=weight.device, requires_grad=True)
        ends = 1 if spec.sym else 2
        self.clip = torch.ones((ends, *scale.shape), dtype=torch.float32, device=weight.device)
        self.clip.requires_grad_(tune_clip)

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """What the optimizer moves: `value`, and `clip` unless it is fixed."""
        return {"value": self.value, "clip": self.clip} if self.clip.requires_grad else {"value": self.value}

    def scale_and_zero(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Stored scale and zero for the present clipping; differentiable, straight through their rounding."""
        clip = self.clip.clamp(*self.CLIP_BOUNDS)
        if self.start_zero is None:
            return StraightThrough.apply(self.start_scale * clip[0], store_scale), None
        levels = (1 << self.spec.bits) - 1
        low = -self.start_zero * self.start_scale * clip[0]
        high = (levels - self.start_zero) * self.start_scale * clip[1]
        scale = StraightThrough.apply((high - low) / levels, store_scale)
        return scale, StraightThrough.apply(-low / scale, torch.round).clamp(0, levels)

    def fake_quantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The quantized weight [out, in] in `dtype`, with gradients for `value` and `clip`."""
        scale, zero = self.scale_and_zero()
        weight = _FakeQuantize.apply(self.weight, self.value, self.start_scale, scale, zero, self.spec.bits, dtype)
        return weight.view(self.shape)

    def reset(self) -> None:
        """Back to the starting point."""
        self.value.data.zero_()
        self.clip.data.fill_(1.0)

    @torch.no_grad()
    def finish(self) -> QuantizedTensor:
        scale, zero = self.scale_and_zero()
        return finish(self.weight.reshape(self.shape), scale, zero, self.value, self.spec, self.start_scale)


class _FakeQuantize(torch.autograd.Function):
    """w' = s·(code - zero) of grouped weights [rows, groups, inputs per group], with the backward written out.

    Both go through a few rows at a time, which stay in the cache, and nothing is kept between them: to find the codes
    again costs less than to keep them. Rounding passes gradients straight through; the clamp stops them.
    """

    @staticmethod
    def forward(ctx, weight, value, grid, scale, zero, bits, dtype):
        ctx.save_for_backward(weight, value, grid, scale, zero)
        ctx.bits = bits
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for part in _row_parts(weight):
            _, clamped = _steps(weight[part], value[part], grid[part], None if zero is None else zero[part], bits)
            out[part] = clamped.mul_(scale[part].unsqueeze(-1))
        return out

    @staticmethod
    def backward(ctx, grad):
        weight, value, grid, scale, zero = ctx.saved_tensors
        grad_value = torch.empty(weight.shape, device=weight.device)
        grad_scale = torch.empty_like(scale) if ctx.needs_input_grad[3] else None
        grad_zero = torch.empty_like(zero) if zero is not None and ctx.needs_input_grad[4] else None
        for part in _row_parts(weight):
            low = None if zero is None else zero[part]
            steps, clamped = _steps(weight[part], value[part], grid[part], low, ctx.bits)
            slope, inside = grad[part].float(), (clamped == steps).float()
            if grad_scale is not None:  # d w'/d s = code - zero
                grad_scale[part] = clamped.mul_(slope).sum(-1)
            slope = slope.mul(scale[part].unsqueeze(-1))
            if grad_zero is not None:
                grad_zero[part] = (inside - 1).mul_(slope).sum(-1)
            torch.mul(slope, inside, out=grad_value[part])
        return None, grad_value, None, grad_scale, grad_zero, None, None


def _steps(
    weight: torch.Tensor, value: torch.Tensor, grid: torch.Tensor, zero: torch.Tensor | None, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps of the grid from zero to each weight, float32: rounded, and clamped to those that have a code, too."""
    steps = (weight.float() / grid.unsqueeze(-1)).add_(value).round_()
    if zero is None:
        return steps, steps.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    low = -zero.unsqueeze(-1)
    return steps, steps.maximum(low).minimum(low + ((1 << bits) - 1))


def _row_parts(groups: torch.Tensor) -> list[slice]:
    """Rows of grouped weights in parts of about CHUNK weights."""
    rows = max(1, CHUNK // groups[0].numel())
    return [slice(begin, begin + rows) for begin in range(0, len(groups), rows)]


Tunable = TunableInt
