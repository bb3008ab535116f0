"""The `auto_awq` format: AWQ's "gemm" layout (`quant_method` "awq"), 4 bits, as vLLM, Transformers and AutoAWQ read it.

A quantized layer becomes `qweight`, `qzeros` and `scales` (layouts: `packing.py`). Zero points are always stored, also
those of symmetric layers (8), and the configuration says so (`zero_point`): readers have their fast kernels for that.

The configuration states one width and one group size, and lists the layers that are kept. Readers take every other
layer in the blocks as quantized, and look for the listed names as parts of a layer's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from auto_round.formats import packing as layouts
from auto_round.formats.auto_gptq import check_weight_only, foreign_config, kept_names, spellings
from auto_round.formats.auto_round import AutoRoundFormat
from auto_round.plan import LayerPlan, ModelPlan, PlanError

BITS = 4
OUTPUTS = 8  # output channels that share a word
GROUP_SIZES = (-1, 16, 32, 64, 128)  # those that kernels read
_FIXED = {
    "sym": False,
    "zero_point": True,
    "version": "gemm",
    "provider": "auto-round",
    "quant_method": "awq",
}


class AutoAwqFormat(AutoRoundFormat):
    """Packs a plan's layers for readers of AWQ checkpoints."""

    pack_attention = None  # they know no scales of attention

    def __init__(self, plan: ModelPlan, name: str = "auto_awq"):
        check_weight_only(plan, name)
        layers = list(plan.quantized().values())
        for layer in layers:
            reason = _objection(layer, layers[0])
            if reason is not None:
                raise PlanError(f"{name} cannot hold {layer.name}: {reason}")
        _check_names(plan, name)
        self.plan, self.name, self.packing = plan, name, layouts.AUTO_AWQ

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`quantization_config`; `settings` are recorded in it unless None."""
        config = foreign_config(super().config(settings), [])
        return {**config, **_FIXED, "modules_to_not_convert": kept_names(self.plan)}


def _objection(layer: LayerPlan, first: LayerPlan) -> str | None:
    """Why a layer does not fit the gemm layout, or not beside the first; None if it does."""
    info, size = layer.info, _group_size(layer)
    if layer.scheme.bits != BITS:
        return f"it has {layer.scheme.bits} bits and the AWQ layout {BITS}; use auto_round or auto_gptq"
    if size not in GROUP_SIZES:
        return f"no AWQ kernel reads group size {size} (only {', '.join(map(str, GROUP_SIZES))}); use auto_round"
    if info.out_features % OUTPUTS or (size > 0 and info.in_features % size):
        return (
            f"its shape {info.out_features}×{info.in_features} needs a multiple of {OUTPUTS} outputs, and inputs that "
            f"the group size {size} divides"
        )
    if size != _group_size(first):
        return (
            f"its group size is {size} and that of {first.name} {_group_size(first)}, and the configuration states "
            "one for all; choose one that divides every layer's inputs, or use auto_round or auto_gptq"
        )
    if info.block is None:
        return "readers of AWQ take layers outside the blocks (an lm_head) as floats; use auto_round or auto_gptq"
    return None


def _group_size(layer: LayerPlan) -> int:
    return layer.scheme.group_size or -1


def _check_names(plan: ModelPlan, name: str) -> None:
    """Refuse a kept layer whose name is a part of a quantized one's: readers would keep both."""
    quantized = "\n".join(spelling for layer in plan.quantized().values() for spelling in spellings(layer.info))
    for kept in kept_names(plan):
        if kept in quantized:
            other = next(line for line in quantized.splitlines() if kept in line)
            raise PlanError(
                f"{name} cannot keep {kept} and quantize {other}: readers look for the one's name within the other's; "
                "keep both, or use auto_round or auto_gptq"
            )
