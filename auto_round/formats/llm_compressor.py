"""The `llm_compressor` format: integer weights as compressed-tensors' `pack-quantized`, 2 to 8 bits.

A quantized layer [out, in] becomes

    weight_packed      int32 [out, in·bits/32]      codes as a bit stream along the inputs (`packing.pack_bits`)
    weight_scale       float16 [out, groups]        as tuned (float32 beside float32 weights)
    weight_shape       int64 [2]                    out, in
    weight_zero_point  int32 [out·bits/32, groups]  asymmetric layers only: a bit stream along the outputs

compressed-tensors computes `scale · (code - zero)` in the dtype of the scale: exactly ours in float16 or float32. What
Transformers (5.23, compressed-tensors 0.20) makes of it decides the configuration:

- Layers that stay packed get scales cast to the model's dtype (bfloat16 has three bits less), and expect unpacked zero
  points, which compressed-tensors itself never writes. With `dequantize` in the configuration the stored tensors are
  used as they are and the result is cast, which moves 2 % of bfloat16 weights to a neighbour instead of 10 %. Nothing
  else changes, as the first forward unpacks packed layers anyway; other readers ignore that key.
- `dequantize` knows one scheme for experts and one for all other layers. So plans with more schemes go without it, and
  cannot be asymmetric. Fused experts always load that way: all of them quantized, in one symmetric scheme.

One scale for a whole tensor (group size 0) is stored as one per output row: vLLM knows no other strategy.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from auto_round.data_type.base import QuantizedTensor, group_count
from auto_round.formats.base import TensorShape
from auto_round.formats.packing import pack_bits, unpack_bits
from auto_round.plan import LayerInfo, LayerPlan, ModelPlan, PlanError
from auto_round.schemes import TensorSpec

FORMAT = "pack-quantized"
_EXPERT = re.compile(r"\.experts\.\d+\.")
_EXPERT_TARGET = r"re:.*\.experts\.\d+\..*"


class LlmCompressorFormat:
    """Packs a plan's layers for compressed-tensors: Transformers, vLLM and SGLang read the result."""

    def __init__(self, plan: ModelPlan, name: str = "llm_compressor"):
        self.plan = plan
        self.name = name
        layers = list(plan.quantized().values())
        if not layers:
            raise PlanError(f"the plan quantizes no layer, so there is nothing to export as {name}")
        self.experts = [layer for layer in layers if _is_expert(layer.info)]
        self.others = [layer for layer in layers if not _is_expert(layer.info)]
        self.dequantize = all(len(_by_scheme(part)) <= 1 for part in (self.experts, self.others))
        self._refuse_layers(layers)
        self._refuse_experts()

    def _refuse_layers(self, layers: Sequence[LayerPlan]) -> None:
        for layer in layers:
            if layer.info.transposed:
                raise PlanError(f"{self.name} holds Linear layers only, and {layer.name} is a Conv1D: use auto_round")
            if (layer.scheme.act_bits or 16) < 16:
                raise PlanError(f"{self.name} holds weights only as yet, and {layer.name} quantizes its inputs")
            if not layer.scheme.sym and not self.dequantize:
                raise PlanError(
                    f"{self.name}: readers take asymmetric layers such as {layer.name} only if all layers have the "
                    f"same bits and group size, and this plan has {_described(self.others)}: use one scheme, "
                    "symmetric ones, or the format auto_round"
                )

    def _refuse_experts(self) -> None:
        fused = next((layer for layer in self.experts if layer.info.fused), None)
        if fused is not None:
            raise PlanError(
                f"{self.name}: the source stores the experts fused, and Transformers does not take them apart to load "
                f"packed ones such as {fused.name}: use auto_round"
            )
        kept = next((layer for layer in self.plan.kept().values() if _is_expert(layer.info)), None)
        if kept is not None:
            raise PlanError(
                f"{self.name}: Transformers loads experts of such a model only if all are quantized, and {kept.name} "
                f"is kept ({kept.reason}): use the format auto_round"
            )
        if not self.experts:
            return
        if len(_by_scheme(self.experts)) > 1:
            raise PlanError(
                f"{self.name}: readers fuse experts, which need one scheme; this plan has {_described(self.experts)}: "
                "use one scheme for all experts, or the format auto_round"
            )
        if not self.experts[0].scheme.sym:
            raise PlanError(
                f"{self.name}: readers know symmetric experts only, and {self.experts[0].name} is asymmetric: "
                "use a symmetric scheme, or the format auto_round"
            )

    def layout(self, layer: LayerPlan) -> dict[str, TensorShape]:
        info, bits = layer.info, layer.scheme.bits
        groups = group_count(info.in_features, layer.scheme.group_size)
        found = {
            "weight_packed": TensorShape((info.out_features, info.in_features * bits // 32), torch.int32),
            "weight_scale": TensorShape((info.out_features, groups), _scale_dtype(info)),
            "weight_shape": TensorShape((2,), torch.int64),
        }
        if not layer.scheme.sym:
            found["weight_zero_point"] = TensorShape((info.out_features * bits // 32, groups), torch.int32)
        return found

    def pack(self, tensor: QuantizedTensor, info: LayerInfo) -> dict[str, torch.Tensor]:
        if tensor.codes.shape != (info.out_features, info.in_features):
            raise ValueError(f"{info.name}: codes {tuple(tensor.codes.shape)} do not fit the layer")
        tensor = tensor.per_row()
        packed = {
            "weight_packed": pack_bits(tensor.codes, tensor.spec.bits),
            "weight_scale": tensor.scale.to(_scale_dtype(info)).contiguous(),
            "weight_shape": torch.tensor(tensor.codes.shape, dtype=torch.int64),
        }
        if tensor.zero_point is not None:
            packed["weight_zero_point"] = pack_bits(tensor.zero_point, tensor.spec.bits, dim=0)
        return packed

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: LayerPlan) -> QuantizedTensor:
        """The inverse of `pack`; a tensor with one scale comes back as `QuantizedTensor.per_row()`."""
        spec = _stored_spec(layer)
        codes = unpack_bits(tensors["weight_packed"], spec.bits)
        if tuple(codes.shape) != tuple(tensors["weight_shape"].tolist()):
            raise ValueError(f"{layer.name}: codes {tuple(codes.shape)} are not of the stored weight_shape")
        zeros = None if spec.sym else unpack_bits(tensors["weight_zero_point"], spec.bits, dim=0)
        return QuantizedTensor(codes, tensors["weight_scale"].half(), zeros, spec)

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`quantization_config`. Settings are left to report.json: the schema of this one is compressed-tensors'."""
        config = {
            "quant_method": "compressed-tensors",
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": self._groups(),
            "ignore": self._ignored(),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        if self.dequantize:
            config["dequantize"] = True
        return config

    def _groups(self) -> dict[str, Any]:
        """A group for each scheme; experts have their own, by which Transformers knows them."""
        everything = _by_scheme([*self.others, *self.experts])
        if len(everything) == 1:
            found = [(spec, ["Linear"]) for spec in everything]
        else:
            found = [(spec, _names(layer.info for layer in same)) for spec, same in _by_scheme(self.others).items()]
            found += [(spec, [_EXPERT_TARGET]) for spec in _by_scheme(self.experts)]
        return {f"group_{index}": _group(spec, targets) for index, (spec, targets) in enumerate(found)}

    def _ignored(self) -> list[str]:
        """Exact names of all that "Linear" would cover and that is not quantized."""
        return list(dict.fromkeys([*_names(layer.info for layer in self.plan.kept().values()), *self.plan.beside]))


def _is_expert(info: LayerInfo) -> bool:
    return _EXPERT.search(f".{info.stem}.") is not None


def _scale_dtype(info: LayerInfo) -> torch.dtype:
    """float32 beside float32 models, else float16 as tuned: bfloat16 could not hold the scales."""
    return torch.float32 if info.dtype == torch.float32 else torch.float16


def _names(infos: Any) -> list[str]:
    """The stored names; where Transformers gives a layer another name, that one too, as it looks for its own."""
    return list(dict.fromkeys(name for info in infos for name in (info.stem, info.name)))


def _stored_spec(layer: LayerPlan) -> TensorSpec:
    """The scheme as it is stored: one group per row, whatever it was called."""
    single = group_count(layer.info.in_features, layer.scheme.group_size) == 1
    return dataclasses.replace(layer.scheme.weight, group_size=-1 if single else layer.scheme.group_size)


def _by_scheme(layers: Sequence[LayerPlan]) -> dict[TensorSpec, list[LayerPlan]]:
    found: dict[TensorSpec, list[LayerPlan]] = {}
    for layer in layers:
        found.setdefault(_stored_spec(layer), []).append(layer)
    return found


def _described(layers: Sequence[LayerPlan]) -> str:
    """`4 bits asym g32 (a, and 11 more); 8 bits …`"""
    parts = []
    for spec, same in _by_scheme(layers).items():
        size = f"g{spec.group_size}" if spec.group_size > 0 else "per channel"
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        parts.append(f"{spec.bits} bits {'sym' if spec.sym else 'asym'} {size} ({same[0].name}{more})")
    return "; ".join(parts)


def _group(spec: TensorSpec, targets: list[str]) -> dict[str, Any]:
    grouped = spec.group_size > 0
    return {
        "targets": targets,
        "weights": {
            "num_bits": spec.bits,
            "type": "int",
            "symmetric": spec.sym,
            "strategy": "group" if grouped else "channel",
            "group_size": spec.group_size if grouped else None,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }
