"""Float8 (E4M3) with one scale per output row, per tensor or per two-dimensional block.

    s = bfloat16(max|w| / 448)      code = e4m3(w / s)      w' = s · code

Scales are kept in bfloat16, as files have them, before they divide the weight: values and scales then belong together.
Activations take a scale per group or per token found for each input, or one for all that calibration found.
"""

from __future__ import annotations

from functools import partial

import torch

from auto_round.data_type.base import QuantizedTensor, WeightTask
from auto_round.data_type.float_codes import E4M3, TunableFloat, best_scale, decode, encode, largest_of
from auto_round.data_type.inputs import largest_in, round_input
from auto_round.schemes import TensorSpec

MIN_SCALE = 1.0 / (448 * 512)  # what engines take for inputs of zeros
SEARCH_FACTORS = (1.0, 0.95, 0.9, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4)


def stored(scale: torch.Tensor) -> torch.Tensor:
    """Round float32 scales to bfloat16, kept as float32; never zero."""
    return scale.clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16().float()


def quantize(task: WeightTask) -> QuantizedTensor:
    """Round to nearest."""
    scale = _start(task)
    return _tensor(encode(task.weight, scale, None, E4M3, task.spec.group_size), scale, task.spec)


def tunable(task: WeightTask) -> TunableFloat:
    """The weight under tuning."""
    return TunableFloat(task, E4M3, _start(task), partial(_tensor, spec=task.spec))


def dequantize(tensor: QuantizedTensor) -> torch.Tensor:
    """float32 [out, in]."""
    return decode(tensor.codes, tensor.scale, E4M3, tensor.spec.group_size)


def _start(task: WeightTask) -> torch.Tensor:
    raw = largest_of(task.weight, task.spec.group_size) / E4M3.largest
    if not task.search:
        return stored(raw)
    return best_scale(task, E4M3, (stored(raw * factor) for factor in SEARCH_FACTORS))


def _tensor(codes: torch.Tensor, scale: torch.Tensor, spec: TensorSpec) -> QuantizedTensor:
    return QuantizedTensor(codes, scale, None, spec)


def input_scale(largest: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """float32 [1]: largest / 448 in bfloat16."""
    return (largest.detach().float().reshape(1) / E4M3.largest).clamp(min=MIN_SCALE).bfloat16().float()


def quantize_input(x: torch.Tensor, spec: TensorSpec, input_scale: torch.Tensor | None) -> torch.Tensor:
    """`x` [..., in] as an engine rounds it, in its dtype; gradients pass straight through."""

    def round_groups(groups: torch.Tensor) -> torch.Tensor:
        scale = input_scale
        if scale is None:
            scale = largest_in(groups).div_(E4M3.largest).clamp_(min=MIN_SCALE)
        return E4M3.round_(groups.div_(scale)).mul_(scale)

    # A given scale needs no view of the whole tensor.
    return round_input(x, -1 if input_scale is not None else spec.group_size, round_groups)
