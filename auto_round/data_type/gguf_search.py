"""Scales of llama.cpp's super-blocks with the least weighted error, found in the form in which they are stored.

llama.cpp fits a scale (and minimum) to each group alone and rounds them to codes of 4 to 8 bits afterwards. Here that
is only the beginning: codes of scales are then tried one by one with the error that the stored numbers give, and the
half precision factors d and dmin are refitted to the codes by least squares, in turns.

All tensors run over super-blocks in their last dimension: weights [inputs per group, groups, n], scales and minima
[groups, n], d and dmin [n]. So sums over a group or a super-block add whole vectors, which is several times faster than
many short sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from auto_round.schemes import TensorSpec

MAX_HALF = 6.5e4  # below float16's largest value
FIT_STEPS = 8  # scales tried for a group on its own
LOOSE_FIT_STEPS = 36  # the same where scales are not codes, so that no search among codes follows
WIDE_STEPS = 28  # scales tried for a group in stored form
ROUNDS = 2  # of refitting d and dmin, and moving codes by one
SINGULAR = 1e-6  # of a·c, below which a·c - b² is rounding noise


@dataclass(frozen=True)
class Ranges:
    """Smallest and largest code of a weight and of a scale; `has_min`: groups have a minimum, w' = s·q - m.

    Scales that are no codes (Q4_1, Q5_1) count as super-blocks of one group whose code is 1.
    """

    codes: tuple[int, int]
    scales: tuple[int, int]
    has_min: bool

    @classmethod
    def of(cls, spec: TensorSpec) -> Ranges:
        half = 1 << (spec.bits - 1)
        if spec.sym:
            scale_half = 1 << (spec.super_bits - 1)
            return cls((-half, half - 1), (-scale_half, scale_half - 1), False)
        return cls((0, 2 * half - 1), (1, 1) if spec.super_bits is None else (0, (1 << spec.super_bits) - 1), True)

    @property
    def are_codes(self) -> bool:
        """Whether scales are codes."""
        return self.scales[0] < self.scales[1]


@dataclass(frozen=True)
class Scales:
    """Scales as they are stored, in float32: group i has the scale d · codes[i] and the minimum dmin · mins[i]."""

    d: torch.Tensor
    codes: torch.Tensor
    dmin: torch.Tensor | None = None
    mins: torch.Tensor | None = None

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(scale, minimum) of each group, as a reader of the file computes them."""
        return self.d * self.codes, None if self.mins is None else self.dmin * self.mins

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Scales:
        """`function` of every field."""
        return Scales(*(None if field is None else function(field) for field in self.fields()))

    def fields(self) -> tuple[torch.Tensor | None, ...]:
        return self.d, self.codes, self.dmin, self.mins

    @classmethod
    def joined(cls, parts: Sequence[Scales]) -> Scales:
        """Consecutive rows as one."""
        columns = zip(*(part.fields() for part in parts), strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


def to_half(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to what float16 holds."""
    return x.clamp(-MAX_HALF, MAX_HALF).half().float()


def to_codes(x: torch.Tensor, unit: torch.Tensor, limits: tuple[int, int]) -> torch.Tensor:
    """x in whole `unit`s (float32 codes); 0, or the nearest code, where the unit is 0."""
    return (x * inverse(unit)).round_().clamp_(*limits)


def decide(
    w: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
    limits: tuple[int, int],
    value: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 codes clamp(RNE((w + m) / s + V)); `scale` and `minimum` broadcast over `w`."""
    quotient = w * inverse(scale) if minimum is None else (w + minimum).mul_(inverse(scale))
    if value is not None:
        quotient += value
    return quotient.round_().clamp_(*limits)


def inverse(x: torch.Tensor) -> torch.Tensor:
    """1/x, and 0 for 0."""
    return x.reciprocal().masked_fill_(x == 0, 0.0)


def minmax_scales(w: torch.Tensor, ranges: Ranges) -> Scales:
    """Scales from the extremes of each group. w: float32 [inputs per group, groups, n]."""
    return _stored(*next(_trials(w, ranges, 1)), ranges, 1.0)


def search_scales(w: torch.Tensor, importance: torch.Tensor, ranges: Ranges) -> Scales:
    """Scales that (nearly) minimise Σ importance · (w' - w)². Both float32 [inputs per group, groups, n]."""
    return _Search(w, importance, ranges).run()


def _trials(w: torch.Tensor, ranges: Ranges, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Scales and minima for which `levels + r` steps cover each group's range: r is 0, then from -1 to 3/4.

    A range around zero, as a minimum is subtracted with a positive sign; where it is a number of its own, any range.
    The scale of symmetric codes is negative where the end of larger magnitude, which gets the lowest code, is positive.
    """
    low, high = w.amin(0), w.amax(0)
    if ranges.has_min and ranges.are_codes:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
    levels = ranges.codes[1] if ranges.has_min else -ranges.codes[0]
    extent = high - low if ranges.has_min else -torch.where(-low > high, low, high)
    yield extent / levels, -low if ranges.has_min else None
    for shift in torch.linspace(-1.0, 0.75, steps - 1).tolist():
        yield extent / (levels + shift), -low if ranges.has_min else None


def _stored(scale: torch.Tensor, minimum: torch.Tensor | None, ranges: Ranges, headroom: float) -> Scales:
    """Group scales and minima as codes; the largest scale gets the code of largest magnitude, divided by `headroom`."""
    if ranges.has_min:
        top = ranges.scales[1]
        d, dmin = to_half(scale.amax(0) * (headroom / top)), to_half(minimum.amax(0) / top)
        return Scales(d, to_codes(scale, d, ranges.scales), dmin, to_codes(minimum, dmin, ranges.scales))
    widest = scale.gather(0, scale.abs().argmax(0, keepdim=True))[0]
    d = to_half(widest * (headroom / ranges.scales[0]))
    return Scales(d, to_codes(scale, d, ranges.scales))


class _Search:
    """Coordinate descent over the stored scales of some super-blocks; every step lowers the error or is dropped."""

    def __init__(self, w: torch.Tensor, importance: torch.Tensor, ranges: Ranges):
        self.w, self.h, self.ranges = w, importance, ranges
        self.sum_h = importance.sum(0)
        self.sum_hw = (importance * w).sum(0)

    def run(self) -> Scales:
        scale, minimum = self.fit(FIT_STEPS if self.ranges.are_codes else LOOSE_FIT_STEPS)
        # With many codes to a weight the best scale is often above the one that covers the group: leave room for that.
        fine = self.ranges.codes[1] - self.ranges.codes[0] > 15
        self.scales = _stored(scale, minimum, self.ranges, 1.1 if fine and self.ranges.are_codes else 1.0)
        self.error = self.measure(*self.scales.decoded())
        if not self.ranges.are_codes:
            for _ in range(ROUNDS):
                self.refit()
            return self.scales
        for factor in torch.linspace(0.7, 1.4, WIDE_STEPS).tolist():
            self.move(to_codes(scale * factor, self.scales.d, self.ranges.scales))
        for _ in range(ROUNDS):
            self.refit()
            for step in (0, 1, -1) if self.ranges.has_min else (1, -1):
                self.move((self.scales.codes + step).clamp_(*self.ranges.scales))
        return self.scales

    def measure(self, scale: torch.Tensor, minimum: torch.Tensor | None) -> torch.Tensor:
        """Weighted error [groups, n] of these scales with the nearest codes."""
        off = decide(self.w, scale, minimum, self.ranges.codes).mul_(scale)
        if minimum is not None:
            off.sub_(minimum)
        return off.sub_(self.w).square_().mul_(self.h).sum(0)

    def fit(self, steps: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Best unrounded scale and minimum of each group on its own: trials, each refitted to its codes."""
        best = None
        for trial in _trials(self.w, self.ranges, steps):
            scale, minimum = self.least_squares(*trial)
            error = self.measure(scale, minimum)
            if best is None:
                best, found = error, [scale, minimum]
                continue
            better = error < best
            best = torch.where(better, error, best)
            found[0] = torch.where(better, scale, found[0])
            if minimum is not None:
                found[1] = torch.where(better, minimum, found[1])
        return found[0], found[1]

    def sums(self, scale: torch.Tensor, minimum: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Σhq², Σhqw and Σhq of each group for the nearest codes q."""
        codes = decide(self.w, scale, minimum, self.ranges.codes)
        weighted = codes * self.h
        return codes.mul_(weighted).sum(0), (weighted * self.w).sum(0), weighted.sum(0)

    def least_squares(
        self, scale: torch.Tensor, minimum: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The scale and minimum that fit the codes of these best; unchanged where the codes do not tell."""
        qq, qw, q = self.sums(scale, minimum)
        if minimum is None:
            return torch.where(qq > 0, qw / qq.clamp(min=1e-30), scale), None
        new_scale, new_minimum, solved = _solve(qq, q, self.sum_h, qw, self.sum_hw)
        if self.ranges.are_codes:
            negative = new_minimum < 0
            new_scale = torch.where(negative, qw / qq.clamp(min=1e-30), new_scale)
            new_minimum = new_minimum.clamp_(min=0)
        solved &= new_scale > 0
        return torch.where(solved, new_scale, scale), torch.where(solved, new_minimum, minimum)

    def move(self, codes: torch.Tensor) -> None:
        """Take these codes of scales, each with the best code of its minimum, in groups where they are better."""
        now = self.scales
        if not self.ranges.has_min:
            return self.keep(Scales(now.d, codes))
        scale, minimum = Scales(now.d, codes, now.dmin, now.mins).decoded()
        weighted = decide(self.w, scale, minimum, self.ranges.codes).mul_(self.h).sum(0)
        minimum = (scale * weighted - self.sum_hw) / self.sum_h
        return self.keep(Scales(now.d, codes, now.dmin, to_codes(minimum, now.dmin, self.ranges.scales)))

    def keep(self, tried: Scales) -> None:
        """Take the codes of `tried` in groups where the error is less."""
        error = self.measure(*tried.decoded())
        better = error < self.error
        mins = None if tried.mins is None else torch.where(better, tried.mins, self.scales.mins)
        self.scales = Scales(tried.d, torch.where(better, tried.codes, self.scales.codes), tried.dmin, mins)
        self.error = torch.where(better, error, self.error)

    def refit(self) -> None:
        """Take the d and dmin that fit all codes best, in super-blocks where that lowers the error."""
        now = self.scales
        qq, qw, q = self.sums(*now.decoded())
        a, x = (qq * now.codes.square()).sum(0), (qw * now.codes).sum(0)
        if now.mins is None:
            d, dmin = torch.where(a > 0, x / a.clamp(min=1e-30), now.d), None
        else:
            b, c = (q * now.codes * now.mins).sum(0), (self.sum_h * now.mins.square()).sum(0)
            d, dmin, solved = _solve(a, b, c, x, (self.sum_hw * now.mins).sum(0))
            d, dmin = torch.where(solved, d, now.d), to_half(torch.where(solved, dmin, now.dmin))
        tried = Scales(to_half(d), now.codes, dmin, now.mins)
        error = self.measure(*tried.decoded())
        better = error.sum(0) < self.error.sum(0)
        self.error = torch.where(better, error, self.error)
        dmin = None if dmin is None else torch.where(better, dmin, now.dmin)
        self.scales = Scales(torch.where(better, tried.d, now.d), now.codes, dmin, now.mins)


def _solve(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The minimum of a·s² - 2b·s·m + c·m² - 2x·s + 2y·m over (s, m), and where it is well defined."""
    determinant = a * c - b * b
    solved = determinant > SINGULAR * a * c
    determinant = torch.where(solved, determinant, torch.ones_like(determinant))
    return (c * x - b * y) / determinant, (b * x - a * y) / determinant, solved
