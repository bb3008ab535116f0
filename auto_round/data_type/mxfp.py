"""Open Compute Microscaling (MX 1.0): groups of 32 share a power of two, elements are E2M1, E4M3 or quarters.

With the largest magnitude m · 2^x of a group (0.5 ≤ m < 1) the shared exponent is x - x_max, where x_max is that of the
element's largest value, plus one if m is beyond a threshold:

    mx_fp, 4 bits       m ≥ 7/8, where rounding to E2M1 would reach the next power of two
    mx_fp, 8 bits       m > 7/8, where E4M3's largest value, 448, would be exceeded
    mx_fp_rceil         m beyond the element's largest: nothing ever saturates
    mx_int              never: the rule of MX 1.0, section 6.3

That is what compressed-tensors, vLLM and their kernels do with activations; MX 1.0 itself saturates in place of adding
one, which loses accuracy at four bits. Readers of weights only decode, so a search may choose any exponent for them.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from auto_round.data_type.base import QuantizedTensor, WeightTask
from auto_round.data_type.float_codes import (
    E2M1,
    E4M3,
    QUARTERS,
    Grid,
    TunableFloat,
    best_scale,
    decode,
    encode,
    largest_of,
)
from auto_round.data_type.inputs import largest_in, round_input
from auto_round.schemes import TensorSpec

BIAS = 127
EXPONENTS = (-126, 127)  # 2^-127 has a byte, too, but many kernels flush it to zero

NEVER = 1.0
GRIDS: dict[tuple[str, int], tuple[Grid, float]] = {
    ("mx_fp", 4): (E2M1, 0.875 - 2.0**-24),  # float32's last mantissa below 7/8
    ("mx_fp", 8): (E4M3, 0.875),
    ("mx_fp_rceil", 4): (E2M1, 0.75),
    ("mx_fp_rceil", 8): (E4M3, 0.875),
    ("mx_int", 4): (QUARTERS, NEVER),
}
"""Element grid, and the mantissa (0.5 … 1) of a group's largest magnitude beyond which its exponent is raised."""


def exponents(largest: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """int32 shared exponents of groups whose largest magnitudes are given (float32)."""
    grid, threshold = GRIDS[spec.data_type, spec.bits]
    mantissa, exponent = torch.frexp(largest)
    _, top = math.frexp(grid.largest)
    return (exponent - top + (mantissa > threshold)).clamp_(*EXPONENTS)


def power(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in float32, exactly; the exponents' bytes are float32's own exponent bits."""
    return ((exponent + BIAS) << 23).clamp_(min=1 << 22).view(torch.float32)


def quantize(task: WeightTask) -> QuantizedTensor:
    """Round to nearest."""
    scale = _start(task)
    grid, _ = GRIDS[task.spec.data_type, task.spec.bits]
    return _tensor(encode(task.weight, scale, None, grid, task.spec.group_size), scale, task.spec)


def tunable(task: WeightTask) -> TunableFloat:
    """The weight under tuning."""
    grid, _ = GRIDS[task.spec.data_type, task.spec.bits]
    return TunableFloat(task, grid, _start(task), partial(_tensor, spec=task.spec))


def dequantize(tensor: QuantizedTensor) -> torch.Tensor:
    """float32 [out, in]."""
    grid, _ = GRIDS[tensor.spec.data_type, tensor.spec.bits]
    return decode(tensor.codes, power(tensor.scale.int() - BIAS), grid, tensor.spec.group_size)


def _start(task: WeightTask) -> torch.Tensor:
    exponent = exponents(largest_of(task.weight, task.spec.group_size), task.spec)
    if not task.search:
        return power(exponent)
    grid, _ = GRIDS[task.spec.data_type, task.spec.bits]
    return best_scale(task, grid, (power((exponent + change).clamp(*EXPONENTS)) for change in (0, -1, 1)))


def _tensor(codes: torch.Tensor, scale: torch.Tensor, spec: TensorSpec) -> QuantizedTensor:
    return QuantizedTensor(codes, (scale.view(torch.int32) >> 23).to(torch.uint8), None, spec)


def input_scale(largest: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """MX has no fixed scales.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{spec.data_type} finds its scales anew for each input: use act_dynamic=True")


def quantize_input(x: torch.Tensor, spec: TensorSpec, input_scale: torch.Tensor | None) -> torch.Tensor:
    """`x` [..., in] as an engine rounds it, in its dtype; gradients pass straight through."""
    grid, _ = GRIDS[spec.data_type, spec.bits]

    def round_groups(groups: torch.Tensor) -> torch.Tensor:
        scale = power(exponents(largest_in(groups), spec))
        return grid.round_(groups.div_(scale)).mul_(scale)

    return round_input(x, spec.group_size, round_groups)
