"""The `auto_gptq` format: the first GPTQ layout (`quant_method` "gptq"), as GPTQModel, vLLM and AutoRound read it.

A quantized layer becomes `qweight`, `qzeros`, `scales` (layouts: `packing.py`) and `g_idx` (input → group). Zero points
are stored one too low, so 0 cannot be stored. A group that has it is written mirrored, which changes no value:
s · (code - 0) = -s · ((top - code) - top), where `top` is the largest code.

Layers that differ from the top level are named in `dynamic` by exact, escaped names. There is no `meta`: Transformers'
AutoRoundConfig refuses configurations that have one.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

import torch

from auto_round.data_type.base import QuantizedTensor
from auto_round.formats import packing as layouts
from auto_round.formats.auto_round import AutoRoundFormat
from auto_round.formats.base import TensorShape
from auto_round.plan import LayerInfo, LayerPlan, ModelPlan, PlanError

WIDTHS = (2, 3, 4, 8)
HEADS = ("lm_head", "embed_out")  # the output projection, which `lm_head` speaks about
_FIXED = {
    "provider": "auto-round",
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
    "desc_act": False,
    "true_sequential": False,
    "damp_percent": 0.01,
}


class AutoGptqFormat(AutoRoundFormat):
    """Packs a plan's layers for readers of GPTQ checkpoints."""

    pack_attention = None  # they know no scales of attention

    def __init__(self, plan: ModelPlan, name: str = "auto_gptq"):
        check_weight_only(plan, name)
        for layer in plan.quantized().values():
            if layer.scheme.bits not in WIDTHS:
                raise PlanError(
                    f"{name} holds layers of 2, 3, 4 or 8 bits, not {layer.name} of {layer.scheme.bits}: use auto_round"
                )
            if layer.info.block is None and not is_head(layer.info):
                raise PlanError(
                    f"{name} holds layers of the blocks and the lm_head only, not {layer.name}: keep it with "
                    f"ignore_layers={layer.name!r}, or use auto_round"
                )
        self.plan, self.name, self.packing = plan, name, layouts.AUTO_GPTQ

    def layout(self, layer: LayerPlan) -> dict[str, TensorShape]:
        return {**super().layout(layer), "g_idx": TensorShape((layer.info.in_features,), torch.int32)}

    def pack(self, tensor: QuantizedTensor, info: LayerInfo) -> dict[str, torch.Tensor]:
        tensor = tensor.per_row()
        if tensor.zero_point is not None:
            tensor = _mirrored(tensor, tensor.zero_point == 0)
        packed = super().pack(tensor, info)
        packed["g_idx"] = torch.arange(info.in_features, dtype=torch.int32) // tensor.group_size
        return packed

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: LayerPlan) -> QuantizedTensor:
        """The inverse of `pack`: asymmetric scales are positive, so a negative one tells a mirrored group."""
        tensor = super().unpack(tensors, layer)
        if tensor.zero_point is None:
            return tensor
        top = (1 << tensor.spec.bits) - 1
        return _mirrored(tensor, torch.signbit(tensor.scale) & (tensor.zero_point == top))

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`quantization_config`; `settings` are recorded in it unless None."""
        heads = [layer.info.stem for layer in self.plan.quantized().values() if layer.info.block is None]
        config = foreign_config(super().config(settings), heads)
        config |= {**_FIXED, "lm_head": bool(heads)}
        rules = _dynamic(self.plan, {key: config[key] for key in ("bits", "group_size", "sym")})
        if rules:
            config["dynamic"] = rules
        inside = _modules_in_block(self.plan)
        if inside:
            config["modules_in_block_to_quantize"] = [[*inside, *heads]]
        return config


def check_weight_only(plan: ModelPlan, name: str) -> None:
    """Refuse a plan without layers, or with what is not integer weights under unquantized activations."""
    if not plan.quantized():
        raise PlanError(f"the plan quantizes no layer, so there is nothing to export as {name}")
    for layer in plan.quantized().values():
        scheme = layer.scheme
        if scheme.data_type != "int" or (scheme.act_bits or 16) < 16:
            raise PlanError(
                f"{name} holds integer weights with unquantized activations only, and {layer.name} has data_type "
                f"{scheme.data_type!r} with act_bits {scheme.act_bits or 16}"
            )


def is_head(info: LayerInfo) -> bool:
    """Whether a layer is the model's output projection."""
    return info.block is None and info.name.rpartition(".")[2] in HEADS


def spellings(info: LayerInfo) -> list[str]:
    """The names under which readers may know a layer: the stored one, and the module's where that is another."""
    return list(dict.fromkeys((info.stem, info.name)))


def kept_names(plan: ModelPlan) -> list[str]:
    """Every matrix that stays in floats, the lm_head too, and that a reader could take for a quantized layer."""
    names = [name for layer in plan.kept().values() for name in spellings(layer.info)]
    return list(dict.fromkeys([*names, *plan.beside]))


def foreign_config(config: dict[str, Any], outside: list[str]) -> dict[str, Any]:
    """Without the keys that only `auto_round` has; where layers are quantized is said by `to_quant_block_names`."""
    ours = ("packing_format", "extra_config", "block_name_to_quantize")
    prefixes = [prefix for prefix in config.get("block_name_to_quantize", "").split(",") if prefix]
    kept = {key: value for key, value in config.items() if key not in ours}
    return {**kept, "to_quant_block_names": ",".join([*prefixes, *outside])}


def _mirrored(tensor: QuantizedTensor, chosen: torch.Tensor) -> QuantizedTensor:
    """The same values, with the scales of the chosen groups [out, groups] negated; doing it twice undoes it."""
    if not chosen.any():
        return tensor
    top = (1 << tensor.spec.bits) - 1
    codes = tensor.codes.view(*chosen.shape, -1)
    return dataclasses.replace(
        tensor,
        codes=torch.where(chosen.unsqueeze(-1), codes ^ top, codes).view_as(tensor.codes),
        scale=torch.where(chosen, -tensor.scale, tensor.scale),
        zero_point=torch.where(chosen, tensor.zero_point ^ top, tensor.zero_point),
    )


def _dynamic(plan: ModelPlan, top: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """GPTQModel's rules, of which the first match wins: "-:" keeps layers, "+:" states what differs from the top."""
    heads = {name for layer in plan.kept().values() if is_head(layer.info) for name in spellings(layer.info)}
    rules: dict[str, dict[str, Any]] = {f"-:{_exactly(n)}": {} for n in kept_names(plan) if n not in heads}
    for layer in plan.quantized().values():
        scheme = layer.scheme
        fields = {"bits": scheme.bits, "group_size": scheme.group_size or -1, "sym": scheme.sym}
        if fields != top:
            rules.update({f"+:{_exactly(name)}": dict(fields) for name in spellings(layer.info)})
    return rules


def _exactly(name: str) -> str:
    return re.escape(name) + "$"


def _modules_in_block(plan: ModelPlan) -> list[str]:
    """Names inside a block of what is quantized in at least one; empty where that is every layer.

    vLLM needs them for parts that it fuses: it looks "qkv_proj" up, which no rule for "q_proj" matches.
    """
    stored = dict(zip(plan.block_names, itertools.chain(*plan.stored_blocks), strict=True))
    wanted: dict[str, None] = {}
    kept: set[str] = set()
    for layer in plan.layers.values():
        info = layer.info
        if info.block is None:
            continue
        block = stored.get(info.block, info.block)
        inside = [info.stem.removeprefix(f"{block}."), info.name.removeprefix(f"{info.block}.")]
        if layer.is_quantized:
            wanted.update(dict.fromkeys(inside))
        else:
            kept.update(inside)
    return list(wanted) if kept - wanted.keys() else []
