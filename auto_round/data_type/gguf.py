"""llama.cpp's number families: integers whose scales are codes themselves, and integers with a half precision minimum.

Formulas, per group of inputs (q: codes, RNE: round half to even, V: rounding offset tuned by SignRound,
arXiv 2309.05516), with the super-block factors d and dmin in float16 and the group's codes sc and mn of a few bits:

    int_sym_dq         Q3_K, Q6_K         w' = (d·sc)·q            q  = clamp(RNE(w / (d·sc) + V), -M, M-1)
    int_asym_dq        Q2_K, Q4_K, Q5_K   w' = (d·sc)·q - dmin·mn  q  = clamp(RNE((w + dmin·mn) / (d·sc) + V), 0, 2M-1)
    int_asym_float_zp  Q4_1, Q5_1         w' = d·q + min           as the line above with sc = 1 and dmin·mn = -min

Codes are decided against the scales as a reader decodes them, so nothing is rounded after that. The structs in a file
are the business of `auto_round/formats/gguf_blocks.py`.
"""

from __future__ import annotations

import torch

from auto_round.data_type.base import QuantizedTensor, WeightTask
from auto_round.data_type.gguf_search import (
    Ranges,
    Scales,
    decide,
    minmax_scales,
    search_scales,
    to_codes,
    to_half,
)
from auto_round.data_type.int import FAVOUR_LARGE
from auto_round.schemes import TensorSpec

CLIP_BITS = 3  # up to which clipping is tuned
CHUNK = 1 << 17  # weights handled at once: scratch memory stays small, and in the cache


def quantize(task: WeightTask) -> QuantizedTensor:
    """Round to nearest."""
    return finish(task.weight, start_point(task), None, task.spec)


def tunable(task: WeightTask) -> TunableBlocks:
    """The weight under tuning."""
    return TunableBlocks(task.weight, task.spec, start_point(task), task.tune_clip)


def dequantize(tensor: QuantizedTensor) -> torch.Tensor:
    """float32 [out, in] weight, computed in the order in which llama.cpp and the gguf package do."""
    spec, extra = tensor.spec, tensor.extra
    d = tensor.scale.float().unsqueeze(-1)
    if "min" in extra:
        scales = Scales(d, torch.ones_like(d), -extra["min"].float().unsqueeze(-1), torch.ones_like(d))
    else:
        codes = _by_block(extra["scales"], d).float()
        has_min = "mins" in extra
        dmin = extra["dmin"].float().unsqueeze(-1) if has_min else None
        scales = Scales(d, codes, dmin, _by_block(extra["mins"], d).float() if has_min else None)
    scale, minimum = scales.decoded()
    values = tensor.codes.view(*scale.shape, -1).float()
    if spec.sym:
        values = values - (1 << (spec.bits - 1))
    values = values.mul_(scale.unsqueeze(-1))
    if minimum is not None:
        values = values.sub_(minimum.unsqueeze(-1))
    return values.view(tensor.codes.shape)


def _by_block(codes: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """[out, groups] as [out, super-blocks, groups of each]."""
    return codes.view(*d.shape[:2], -1)


def blocked(weight: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """View [out, in] as [out, super-blocks, groups of each, inputs per group].

    Raises:
        ValueError: the inputs are no whole number of super-blocks.
    """
    groups = spec.super_group_size or 1
    size = groups * spec.group_size
    if weight.shape[1] % size:
        raise ValueError(
            f"{spec.data_type} of {spec.bits} bits stores super-blocks of {size} inputs, and {weight.shape[1]} are no "
            "multiple: choose a type with blocks of 32, such as GGUF:Q4_0, for this layer"
        )
    return weight.reshape(weight.shape[0], -1, groups, spec.group_size)


def finish(
    weight: torch.Tensor, scales: Scales, value: torch.Tensor | None, spec: TensorSpec, grid: Scales | None = None
) -> QuantizedTensor:
    """Decide the codes: the only place that turns weights into a `QuantizedTensor`.

    weight [out, in]; scales: d and dmin [out, super-blocks, 1], codes [out, super-blocks, groups]; value as `blocked`.
    grid: the scales by which weights are rounded, where they are not those that are stored.
    """
    blocks, ranges = blocked(weight, spec), Ranges.of(spec)
    scale, minimum = (None if x is None else x.unsqueeze(-1) for x in (grid or scales).decoded())
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=weight.device)
    rows = max(1, CHUNK // weight.shape[1])
    for begin in range(0, len(codes), rows):
        part = slice(begin, begin + rows)
        offsets = None if value is None else value[part]
        low = None if minimum is None else minimum[part]
        codes[part] = decide(blocks[part].float(), scale[part], low, ranges.codes, offsets).sub_(ranges.codes[0])
    extra = {}
    if not ranges.are_codes:
        extra["min"] = -scales.dmin.half().squeeze(-1)
    else:
        extra["scales"] = scales.codes.to(torch.uint8 if ranges.has_min else torch.int8).flatten(1)
        if ranges.has_min:
            extra["dmin"] = scales.dmin.half().squeeze(-1)
            extra["mins"] = scales.mins.to(torch.uint8).flatten(1)
    return QuantizedTensor(codes.view(weight.shape), scales.d.half().squeeze(-1), None, spec, extra)


def start_point(task: WeightTask) -> Scales:
    """Stored scales from min/max, or searched for the least weighted error. Shapes as in `finish`."""
    weight, spec = task.weight, task.spec
    blocks, ranges = blocked(weight, spec), Ranges.of(spec)
    importance = torch.ones(weight.shape[1]) if task.importance is None else task.importance.float()
    importance = importance.to(weight.device).clamp(min=importance.mean().item() * 1e-4 + 1e-12)
    channels = blocked(importance.unsqueeze(0), spec)
    found = []
    for part in blocks.split(max(1, CHUNK // weight.shape[1])):
        w = _transposed(part.float())
        if task.search:
            scales = search_scales(w, _favoured(_transposed(channels.expand(part.shape)), w, spec), ranges)
        else:
            scales = minmax_scales(w, ranges)
        found.append(scales.each(lambda x, shape=part.shape: x.view(-1, *shape[:2]).permute(1, 2, 0)))
    return Scales.joined(found)


def _transposed(blocks: torch.Tensor) -> torch.Tensor:
    """[out, super-blocks, groups, inputs] as [inputs, groups, out·super-blocks], see `gguf_search`."""
    return blocks.permute(3, 2, 0, 1).contiguous().flatten(2)


def _favoured(importance: torch.Tensor, w: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Importance of each weight: the channel's, and at few bits times sqrt(2·mean w² + w²) over the super-block.

    The mean counts twice, as in llama.cpp's Q3_K: on a trained model the KL divergence of Q2_K and Q3_K is lowest so.
    """
    if spec.bits > FAVOUR_LARGE:
        return importance
    squares = w.square()
    return importance * (2 * squares.mean((0, 1), keepdim=True) + squares).sqrt()


class TunableBlocks:
    """A weight under tuning: rounding offsets V, and per group how far the range is clipped.

    `value` [out, super-blocks, groups, inputs per group] starts at 0. `clip` [1 or 2, out, super-blocks, groups] starts
    at 1 and multiplies the starting range: one factor for symmetric weights, one for each end for asymmetric ones. The
    factors d and dmin stay, only the codes of scales move: letting d follow the largest scale measured worse. Weights
    are rounded on the grid of the starting scales throughout, as in `int`. Above CLIP_BITS the clipping is fixed, for a
    step of a scale's code costs more there than clipping gains.
    """

    CLIP_BOUNDS = (0.3, 2.0)

    def __init__(self, weight: torch.Tensor, spec: TensorSpec, start: Scales, tune_clip: bool = True):
        self.spec, self.ranges, self.start = spec, Ranges.of(spec), start
        self.shape = weight.shape
        self.weight = blocked(weight.detach(), spec)
        self.value = torch.zeros(self.weight.shape, dtype=torch.float32, device=weight.device, requires_grad=True)
        ends = 2 if self.ranges.has_min else 1
        self.clip = torch.ones((ends, *start.codes.shape), dtype=torch.float32, device=weight.device)
        self.clip.requires_grad_(tune_clip and spec.bits <= CLIP_BITS)

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """What the optimizer moves: `value`, and `clip` unless it is fixed."""
        return {"value": self.value, "clip": self.clip} if self.clip.requires_grad else {"value": self.value}

    def wanted(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and minimum of each group for the present clipping, before they are stored; differentiable."""
        clip = self.clip.clamp(*self.CLIP_BOUNDS)
        scale, minimum = self.start.decoded()
        if minimum is None:
            return scale * clip[0], None
        levels = self.ranges.codes[1]
        low, high = -minimum * clip[0], (levels * scale - minimum) * clip[1]
        return (high - low) / levels, -low

    def scales(self) -> Scales:
        """Stored scales for the present clipping."""
        with torch.no_grad():
            (scale, minimum), start, limits = self.wanted(), self.start, self.ranges.scales
            if not self.ranges.are_codes:
                return Scales(to_half(scale), start.codes, to_half(minimum), start.mins)
            codes = to_codes(scale, start.d, limits)
            if minimum is None:
                return Scales(start.d, codes)
            return Scales(start.d, codes, start.dmin, to_codes(minimum, start.dmin, limits))

    def fake_quantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The quantized weight [out, in] in `dtype`, with gradients for `value` and `clip`."""
        scale, minimum = self.scales().decoded()
        wanted = self.wanted()
        scale = _Through.apply(wanted[0], scale)
        if minimum is not None:
            minimum = _Through.apply(wanted[1], minimum)
        start, limits = self.start.decoded(), self.ranges.codes
        return _FakeQuantize.apply(self.weight, self.value, *start, scale, minimum, limits, dtype).view(self.shape)

    def reset(self) -> None:
        """Back to the starting point."""
        self.value.data.zero_()
        self.clip.data.fill_(1.0)

    @torch.no_grad()
    def finish(self) -> QuantizedTensor:
        return finish(self.weight.reshape(self.shape), self.scales(), self.value, self.spec, self.start)


class _Through(torch.autograd.Function):
    """Its second argument, with the gradient of the first (straight-through estimator)."""

    @staticmethod
    def forward(ctx, smooth, stored):
        return stored

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _FakeQuantize(torch.autograd.Function):
    """w' = s·q - m of blocked weights, with the backward written out.

    Only the codes and the clamp mask (a byte each) are kept for the backward. Rounding passes gradients straight
    through; the clamp stops them.
    """

    @staticmethod
    def forward(ctx, weight, value, grid, shift, scale, minimum, limits, dtype):
        low = None if shift is None else shift.unsqueeze(-1)
        wide = (-(1 << 20), 1 << 20)
        codes = decide(weight.float(), grid.unsqueeze(-1), low, wide, value)
        clamped = codes.clamp(*limits)
        ctx.save_for_backward(scale, minimum, clamped.to(torch.int8), clamped == codes)
        clamped = clamped.mul_(scale.unsqueeze(-1))
        return (clamped if minimum is None else clamped.sub_(minimum.unsqueeze(-1))).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        scale, minimum, codes, inside = ctx.saved_tensors
        grad = grad.float()
        grad_scale = (grad * codes).sum(-1) if ctx.needs_input_grad[4] else None
        grad_minimum = -grad.sum(-1) if minimum is not None and ctx.needs_input_grad[5] else None
        return None, (grad * scale.unsqueeze(-1)).mul_(inside), None, None, grad_scale, grad_minimum, None, None
