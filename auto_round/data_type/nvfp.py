"""NVFP4: E2M1 elements in blocks of 16 with E4M3 block scales, and one float32 scale for the whole tensor.

    G  = 2^floor(log2(448 · 6 / max|w|))         global scale, kept as a divisor
    s8 = e4m3(G · max|block| / 6)                block scale
    w' = code · s8 / G

Layers that engines fuse share one G, so it follows their common maximum (`WeightTask.fused_max`). Activations have a G
fixed by calibration and block scales found for each input. The formulas are those of compressed-tensors and vLLM, but
for the rounding of G (see `global_scale`).
"""

from __future__ import annotations

from functools import partial

import torch

from auto_round.data_type.base import QuantizedTensor, WeightTask
from auto_round.data_type.float_codes import E2M1, E4M3, TunableFloat, best_scale, decode, encode, largest_of, to_e4m3
from auto_round.data_type.inputs import largest_in, round_input
from auto_round.schemes import TensorSpec

GLOBAL = "global_scale"
MIN_BLOCK = 2.0**-9  # E4M3's least value: no block scale of a weight is zero
ZERO_BLOCK = 0.125  # stands for a block scale of zero when inputs are divided: all codes become zero
SEARCH_CODES = range(-6, 7)  # neighbouring E4M3 codes, a factor of 0.6 to 1.7


def global_scale(largest: torch.Tensor) -> torch.Tensor:
    """float32 [1]: the power of two below 2688 / largest; 1 where there is nothing to scale (an expert without tokens).

    A power of two loses nothing where readers divide block scales by it in bfloat16, as compressed-tensors does: with
    2688 / largest itself its weights are 4e-3 off, and the logits of a small model 5 %. Block scales are as exact in
    either half of their range.
    """
    scale = E4M3.largest * E2M1.largest / largest.detach().float().reshape(1)
    _, exponent = torch.frexp(scale)
    whole = torch.ldexp(torch.ones_like(scale), exponent - 1)
    return torch.where(scale.isfinite(), whole, torch.ones_like(scale))


def quantize(task: WeightTask) -> QuantizedTensor:
    """Round to nearest."""
    scale, overall = _start(task)
    return _tensor(encode(task.weight, scale, None, E2M1, task.spec.group_size), scale, task.spec, overall)


def tunable(task: WeightTask) -> TunableFloat:
    """The weight under tuning."""
    scale, overall = _start(task)
    return TunableFloat(task, E2M1, scale, partial(_tensor, spec=task.spec, overall=overall))


def dequantize(tensor: QuantizedTensor) -> torch.Tensor:
    """float32 [out, in]."""
    return decode(tensor.codes, tensor.scale.float() / tensor.extra[GLOBAL], E2M1, tensor.spec.group_size)


def _start(task: WeightTask) -> tuple[torch.Tensor, torch.Tensor]:
    """(block scales over G, G)."""
    blocks = largest_of(task.weight, task.spec.group_size)
    most = blocks.amax() if task.fused_max is None else torch.tensor(task.fused_max, device=blocks.device)
    overall = global_scale(most)
    scale = _stored(blocks / E2M1.largest, overall)
    if not task.search:
        return scale, overall
    codes = to_e4m3(scale * overall).view(torch.uint8).int()
    nearest_first = sorted(SEARCH_CODES, key=abs)
    return best_scale(task, E2M1, (_of_codes(codes + change) / overall for change in nearest_first)), overall


def _of_codes(codes: torch.Tensor) -> torch.Tensor:
    """Positive E4M3 values of codes, which are in the order of the values."""
    return E4M3.decode(codes.clamp(1, 126).to(torch.uint8))


def _stored(scale: torch.Tensor, overall: torch.Tensor) -> torch.Tensor:
    return to_e4m3((scale * overall).clamp(min=MIN_BLOCK)).float() / overall


def _tensor(codes: torch.Tensor, scale: torch.Tensor, spec: TensorSpec, overall: torch.Tensor) -> QuantizedTensor:
    return QuantizedTensor(codes, to_e4m3(scale * overall), None, spec, {GLOBAL: overall})


def input_scale(largest: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """float32 [1], G of inputs up to this magnitude."""
    return global_scale(largest)


def quantize_input(x: torch.Tensor, spec: TensorSpec, input_scale: torch.Tensor | None) -> torch.Tensor:
    """`x` [..., in] as an engine rounds it, in its dtype; gradients pass straight through.

    Raises:
        ValueError: no calibrated scale is given.
    """
    if input_scale is None:
        raise ValueError("NVFP4 inputs need the global scale that calibration finds, and there is none")

    def round_groups(groups: torch.Tensor) -> torch.Tensor:
        block = to_e4m3(largest_in(groups) / E2M1.largest * input_scale).float()
        scale = torch.where(block == 0, ZERO_BLOCK, block) / input_scale
        return E2M1.round_(groups.div_(scale)).mul_(scale)

    return round_input(x, spec.group_size, round_groups)
