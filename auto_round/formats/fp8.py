"""The `fp8` format: float8 in blocks, as Transformers' fine-grained FP8, vLLM and SGLang read it (DeepSeek-V3's).

A quantized layer [out, in] becomes `weight` in float8_e4m3fn and `weight_scale_inv` float32 [out/128, in/128]; despite
its name the latter multiplies. Inputs are quantized in groups of 128 while a model runs, so nothing of them is stored.

Readers divide a matrix into as many equal parts as it has scales (Transformers without a GPU), or take whole blocks of
inputs (its kernels): so blocks must fill the inputs, and the outputs if there is more than one block of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from auto_round.data_type.base import QuantizedTensor
from auto_round.formats.base import ExportFormat, TensorShape
from auto_round.formats.float_layouts import Fp8
from auto_round.plan import LayerInfo, LayerPlan, ModelPlan, PlanError

LAYOUT = Fp8("weight_scale_inv")


class Fp8Format(ExportFormat):
    """Packs a plan whose layers are all in float8 with blocks of one size."""

    def __init__(self, plan: ModelPlan, name: str = "fp8"):
        self.plan = plan
        self.name = name
        layers = list(plan.quantized().values())
        if not layers:
            raise PlanError(f"the plan quantizes no layer, so there is nothing to export as {name}")
        self.block = layers[0].scheme.group_size
        for layer in layers:
            problem = _misfit(layer) or self._other(layer) or self._swept_up(layer)
            if problem:
                raise PlanError(f"{name} cannot hold {layer.name}: {problem}")
        kept = next((layer for layer in plan.kept().values() if _is_expert(layer.info)), None)
        if kept is not None and any(_is_expert(layer.info) for layer in layers):
            raise PlanError(
                f"{name}: readers fuse experts, so all are quantized or none, and {kept.name} is kept ({kept.reason}): "
                "use the format auto_round"
            )

    def _other(self, layer: LayerPlan) -> str | None:
        if layer.scheme.group_size == self.block:
            return None
        return f"its blocks are {layer.scheme.group_size}, and those of others {self.block}: use one size"

    def _swept_up(self, layer: LayerPlan) -> str | None:
        """Readers take a name in `modules_to_not_convert` for a beginning, an end and an expression."""
        for name in self._kept():
            for own in (layer.info.stem, layer.name):
                if re.match(rf"(?:{name})(?:(?<=\.)|(?=\.|$))", own) or own.endswith(name):
                    return f"readers would leave it out, as {name} is: use the format auto_round"
        return None

    def _kept(self) -> list[str]:
        kept = [name for layer in self.plan.kept().values() for name in (layer.info.stem, layer.name)]
        return list(dict.fromkeys([*kept, *self.plan.beside]))

    def layout(self, layer: LayerPlan) -> dict[str, TensorShape]:
        return LAYOUT.shapes(layer.info.out_features, layer.info.in_features, layer.scheme.weight)

    def pack(self, tensor: QuantizedTensor, info: LayerInfo) -> dict[str, torch.Tensor]:
        if tensor.codes.shape != (info.out_features, info.in_features):
            raise ValueError(f"{info.name}: codes {tuple(tensor.codes.shape)} do not fit the layer")
        return LAYOUT.pack(tensor)

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: LayerPlan) -> QuantizedTensor:
        return LAYOUT.unpack(tensors, layer.scheme.weight)

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`quantization_config`: exact names of all that is kept. Settings are left to report.json."""
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(self.block),
            "modules_to_not_convert": self._kept(),
        }


def _is_expert(info: LayerInfo) -> bool:
    return re.search(r"\.experts\.\d+\.", f".{info.stem}.") is not None


def _misfit(layer: LayerPlan) -> str | None:
    """Why no reader of this format takes the layer; None if they do."""
    info, scheme = layer.info, layer.scheme
    act = scheme.act
    if scheme.data_type != "fp" or not isinstance(scheme.group_size, tuple):
        return "it holds float8 in two-dimensional blocks only: use the scheme FP8_BLOCK"
    high, wide = scheme.group_size
    if act is None or act.data_type != "fp" or not act.dynamic or act.group_size != wide:
        return f"readers quantize inputs to float8 in groups of {wide}, and its scheme does not: use FP8_BLOCK"
    if info.transposed:
        return "it is a Conv1D, and readers know Linear layers only: use the format auto_round"
    if info.fused:
        return "the source stores its experts fused, and readers would not take them apart: use the format auto_round"
    if info.in_features % wide or (info.out_features > high and info.out_features % high):
        shape = f"{info.out_features}×{info.in_features}"
        return f"its shape {shape} does not divide into blocks of {high}×{wide}: keep it with ignore_layers"
    return None
