"""The `llm_compressor` format: what compressed-tensors, and with it Transformers, vLLM and SGLang, can read.

Integers of 2 to 8 bits become `pack-quantized`; a quantized layer [out, in] is stored as

    weight_packed      int32 [out, in·bits/32]      codes as a bit stream along the inputs (`packing.pack_bits`)
    weight_scale       float16 [out, groups]        as tuned (float32 beside float32 weights)
    weight_shape       int64 [2]                    out, in
    weight_zero_point  int32 [out·bits/32, groups]  asymmetric layers only: a bit stream along the outputs

All others are of `float_layouts.py`: `int-quantized` (INT8 with inputs in 8 bits), `float-quantized` (float8 by rows,
tensor or blocks; `naive-quantized` without inputs), `mxfp4-pack-quantized`, `mxfp8-quantized`, `nvfp4-pack-quantized`.
Layers may differ: each scheme is a group with its own format. How an engine rounds the exponents of MX inputs is its
own affair, so the *_RCEIL schemes are written as the others. Scales of float8 and INT8 weights are float32.

What Transformers (5.23, compressed-tensors 0.20) makes of it decides the configuration:

- Layers that stay packed get scales cast to the model's dtype (bfloat16 has three bits less), and expect unpacked zero
  points, which compressed-tensors itself never writes. With `dequantize` in the configuration the stored tensors are
  used as they are and the result is cast, which moves 2 % of bfloat16 weights to a neighbour instead of 10 %. Nothing
  else changes, as the first forward unpacks packed layers anyway; other readers ignore that key.
- `dequantize` leaves inputs as they are, so plans that quantize inputs go without it. But compressed-tensors unpacks MX
  and NVFP4 weights to bfloat16, whatever the model's dtype: models in another dtype load only with `dequantize`.
- `dequantize` knows one scheme for experts and one for all other layers. So plans with more schemes go without it, and
  cannot be asymmetric. Fused experts always load that way: all of them quantized, in one scheme (`_expert_problem`).

One scale for a whole tensor (group size 0) is stored as one per output row, except for float8: vLLM knows no other
strategy for integers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from auto_round.data_type.base import QuantizedTensor, group_count
from auto_round.formats.base import ExportFormat, TensorShape
from auto_round.formats.float_layouts import Fp8, Int8, LayerLayout, Mx4, Mx8, Nvfp4, check_scheme
from auto_round.formats.packing import pack_bits, unpack_bits
from auto_round.plan import LayerInfo, LayerPlan, ModelPlan, PlanError
from auto_round.schemes import QuantizationScheme, TensorSpec

MIXED = "mixed-precision"
_EXPERT = re.compile(r"\.experts\.\d+\.")
_EXPERT_TARGET = r"re:.*\.experts\.\d+\..*"


class _Stored(NamedTuple):
    """What layers of one group have in common."""

    weight: TensorSpec
    act: TensorSpec | None


class LlmCompressorFormat(ExportFormat):
    """Packs a plan's layers for compressed-tensors: Transformers, vLLM and SGLang read the result."""

    def __init__(self, plan: ModelPlan, name: str = "llm_compressor"):
        self.plan = plan
        self.name = name
        layers = list(plan.quantized().values())
        if not layers:
            raise PlanError(f"the plan quantizes no layer, so there is nothing to export as {name}")
        self.experts = [layer for layer in layers if _is_expert(layer.info)]
        self.others = [layer for layer in layers if not _is_expert(layer.info)]
        self._refuse_layers(layers)
        few = all(len(_by_scheme(part)) <= 1 for part in (self.experts, self.others))
        foreign = next((layer for layer in layers if _only_bfloat16(layer)), None)
        if foreign is not None and not few:
            raise PlanError(
                f"{self.name}: readers unpack {foreign.scheme.data_type} weights such as those of {foreign.name} to "
                f"bfloat16, and the model is in {str(foreign.info.dtype).removeprefix('torch.')}: that works with one "
                f"scheme for all layers only. Convert the model to bfloat16 first, or use the format auto_round"
            )
        self.dequantize = few and (foreign is not None or all(layer.scheme.act is None for layer in layers))
        self._refuse_asymmetric()
        self._refuse_experts()

    def _refuse_layers(self, layers: Sequence[LayerPlan]) -> None:
        for layer in layers:
            scheme, info = layer.scheme, layer.info
            if info.transposed:
                raise PlanError(f"{self.name} holds Linear layers only, and {layer.name} is a Conv1D: use auto_round")
            if scheme.data_type == "mx_int":
                raise PlanError(f"{self.name} has no MXINT4, which {layer.name} has: use auto_round, or MXFP4")
            if scheme.data_type == "int" and scheme.act is None:
                continue
            try:
                check_scheme(scheme)
            except ValueError as error:
                raise PlanError(f"{self.name} cannot hold {layer.name}: {error}") from error
            wide = scheme.group_size[1] if isinstance(scheme.group_size, tuple) else 1
            if info.in_features % wide:
                raise PlanError(
                    f"{self.name}: readers take whole blocks of inputs, and the {info.in_features} of {layer.name} "
                    f"are not a multiple of {wide}: keep it in 16 bits, or use the format auto_round"
                )

    def _refuse_asymmetric(self) -> None:
        layer = next((layer for layer in self.others if not layer.scheme.sym), None)
        if layer is not None and not self.dequantize:
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
        problem = _expert_problem(self.experts[0].scheme)
        if problem:
            raise PlanError(f"{self.name}: {problem}, such as {self.experts[0].name}: use the format auto_round")

    def layout(self, layer: LayerPlan) -> dict[str, TensorShape]:
        info = layer.info
        return _layout(layer)[1].shapes(info.out_features, info.in_features, layer.scheme)

    def pack(self, tensor: QuantizedTensor, info: LayerInfo) -> dict[str, torch.Tensor]:
        if tensor.codes.shape != (info.out_features, info.in_features):
            raise ValueError(f"{info.name}: codes {tuple(tensor.codes.shape)} do not fit the layer")
        layer = self.plan.layers[info.name]
        return _layout(layer)[1].pack(tensor, layer.scheme, info.name)

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: LayerPlan) -> QuantizedTensor:
        """The inverse of `pack`; integers with one scale come back as `QuantizedTensor.per_row()`."""
        scheme = dataclasses.replace(layer.scheme, group_size=_stored(layer).weight.group_size)
        return _layout(layer)[1].unpack(tensors, scheme)

    def pack_attention(self, scale: torch.Tensor, per_head: bool) -> torch.Tensor:
        """A scale of attention: [1], or [heads, 1, 1] as keys [batch, heads, length, size] are multiplied with it."""
        return scale.view(-1, 1, 1) if per_head else scale

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`quantization_config`. Settings are left to report.json: the schema of this one is compressed-tensors'."""
        groups = self._groups()
        formats = {group["format"] for group in groups.values()}
        config = {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": self._ignored(),
            "kv_cache_scheme": _kv_cache(settings),
            "global_compression_ratio": None,
        }
        if self.dequantize:
            config["dequantize"] = True
        return config

    def _groups(self) -> dict[str, Any]:
        """A group for each scheme; experts have their own, by which Transformers knows them."""
        everything = _by_scheme([*self.others, *self.experts])
        if len(everything) == 1:
            found = [(same[0], ["Linear"]) for same in everything.values()]
        else:
            found = [(same[0], _names(layer.info for layer in same)) for same in _by_scheme(self.others).values()]
            found += [(same[0], [_EXPERT_TARGET]) for same in _by_scheme(self.experts).values()]
        return {f"group_{index}": _group(layer, targets) for index, (layer, targets) in enumerate(found)}

    def _ignored(self) -> list[str]:
        """Exact names of all that "Linear" would cover and that is not quantized."""
        return list(dict.fromkeys([*_names(layer.info for layer in self.plan.kept().values()), *self.plan.beside]))


@dataclass(frozen=True)
class _PackedIntegers:
    """`pack-quantized`, see the top of this file; `scale_dtype` is what the scales are stored in."""

    scale_dtype: torch.dtype

    def shapes(self, rows: int, columns: int, spec: TensorSpec) -> dict[str, TensorShape]:
        groups = group_count(columns, spec.group_size)
        found = {
            "weight_packed": TensorShape((rows, columns * spec.bits // 32), torch.int32),
            "weight_scale": TensorShape((rows, groups), self.scale_dtype),
            "weight_shape": TensorShape((2,), torch.int64),
        }
        if not spec.sym:
            found["weight_zero_point"] = TensorShape((rows * spec.bits // 32, groups), torch.int32)
        return found

    def pack(self, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        tensor = tensor.per_row()
        packed = {
            "weight_packed": pack_bits(tensor.codes, tensor.spec.bits),
            "weight_scale": tensor.scale.to(self.scale_dtype).contiguous(),
            "weight_shape": torch.tensor(tensor.codes.shape, dtype=torch.int64),
        }
        if tensor.zero_point is not None:
            packed["weight_zero_point"] = pack_bits(tensor.zero_point, tensor.spec.bits, dim=0)
        return packed

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: TensorSpec) -> QuantizedTensor:
        codes = unpack_bits(tensors["weight_packed"], spec.bits)
        if tuple(codes.shape) != tuple(tensors["weight_shape"].tolist()):
            raise ValueError(f"codes {tuple(codes.shape)} are not of the stored weight_shape")
        zeros = None if spec.sym else unpack_bits(tensors["weight_zero_point"], spec.bits, dim=0)
        return QuantizedTensor(codes, tensors["weight_scale"].half(), zeros, spec)


def _layout(layer: LayerPlan) -> tuple[str, LayerLayout]:
    """compressed-tensors' name of a layer's format, and the tensors it consists of."""
    scheme = layer.scheme
    with_inputs = scheme.act is not None
    if scheme.data_type == "int":
        # bfloat16 could not hold the scales of groups; beside float32 weights, readers compute in the scales' dtype.
        packed = _PackedIntegers(torch.float32 if layer.info.dtype == torch.float32 else torch.float16)
        return ("int-quantized", LayerLayout(Int8())) if with_inputs else ("pack-quantized", LayerLayout(packed))
    if scheme.data_type == "fp":
        return "float-quantized" if with_inputs else "naive-quantized", LayerLayout(Fp8(whole=True))
    if scheme.data_type == "nv_fp":
        return "nvfp4-pack-quantized", LayerLayout(Nvfp4())
    return ("mxfp4-pack-quantized", LayerLayout(Mx4())) if scheme.bits == 4 else ("mxfp8-quantized", LayerLayout(Mx8()))


def _only_bfloat16(layer: LayerPlan) -> bool:
    """Whether compressed-tensors unpacks a layer to another dtype than its model's."""
    return layer.scheme.data_type in ("mx_fp", "nv_fp") and layer.info.dtype != torch.bfloat16


def _is_expert(info: LayerInfo) -> bool:
    return _EXPERT.search(f".{info.stem}.") is not None


def _expert_problem(scheme: QuantizationScheme) -> str | None:
    """Why Transformers cannot fuse experts of that scheme while it loads them; None if it can."""
    if not scheme.sym:
        return "readers know symmetric experts only, and this plan has asymmetric ones"
    plain = scheme.data_type == "int" and scheme.act is None
    rows = scheme.data_type == "fp" and scheme.group_size in (-1, 0)
    if plain or rows or (scheme.data_type == "mx_fp" and scheme.bits == 4):
        return None
    return (
        "Transformers fuses experts of plain integers, of MXFP4, and of float8 with a scale per row or tensor, and not "
        f"experts in {scheme.data_type} of {scheme.bits} bits"
    )


def _names(infos: Any) -> list[str]:
    """The stored names; where Transformers gives a layer another name, that one too, as it looks for its own."""
    return list(dict.fromkeys(name for info in infos for name in (info.stem, info.name)))


def _stored(layer: LayerPlan) -> _Stored:
    """The scheme as it is stored: one group per row, whatever it was called."""
    weight, act = layer.scheme.weight, layer.scheme.act
    if weight.data_type == "int" and group_count(layer.info.in_features, weight.group_size) == 1:
        weight = dataclasses.replace(weight, group_size=-1)
    return _Stored(weight, act)


def _by_scheme(layers: Sequence[LayerPlan]) -> dict[_Stored, list[LayerPlan]]:
    found: dict[_Stored, list[LayerPlan]] = {}
    for layer in layers:
        found.setdefault(_stored(layer), []).append(layer)
    return found


def _described(layers: Sequence[LayerPlan]) -> str:
    """`4 bits asym g32 (a, and 11 more); 8 bits …`"""
    parts = []
    for (spec, act), same in _by_scheme(layers).items():
        grouped = isinstance(spec.group_size, int) and spec.group_size > 0
        kind = ("sym" if spec.sym else "asym") if spec.data_type == "int" else spec.data_type
        inputs = f", inputs of {act.bits} bits" if act else ""
        size = f"g{spec.group_size}" if grouped else "per channel" if spec.data_type == "int" else "by its family"
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        parts.append(f"{spec.bits} bits {kind} {size}{inputs} ({same[0].name}{more})")
    return "; ".join(parts)


# ---- compressed-tensors' schema ------------------------------------------------------------------------------------


def _group(layer: LayerPlan, targets: list[str]) -> dict[str, Any]:
    """A config group for layers stored like this one."""
    weight, act = _stored(layer)
    return {
        "targets": targets,
        "weights": _args(weight, _weight_strategy(weight), False),
        "input_activations": None if act is None else _input_args(act),
        "output_activations": None,
        "format": _layout(layer)[0],
    }


def _kv_cache(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the cache is stored. Scales of queries need no word: engines take those that are there."""
    asked = {key: value for key, value in settings.items() if key.startswith(("static_kv_", "static_attention_"))}
    if not asked:
        return None
    strategy = "attn_head" if "head" in asked.values() else "tensor"
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}


def _weight_strategy(spec: TensorSpec) -> str:
    if isinstance(spec.group_size, tuple):
        return "block"
    if spec.data_type == "nv_fp":
        return "tensor_group"
    if spec.group_size == 0:
        return "tensor"
    return "group" if spec.group_size > 0 else "channel"


def _input_args(spec: TensorSpec) -> dict[str, Any]:
    if spec.data_type.startswith("nv_fp"):
        return _args(spec, "tensor_group", "local")  # scales of groups are found anew, that of the tensor is fixed
    strategy = {0: "tensor", -1: "token"}.get(spec.group_size, "group")
    return _args(spec, strategy, spec.dynamic)


def _args(spec: TensorSpec, strategy: str, dynamic: bool | str) -> dict[str, Any]:
    """The schema's description of a tensor."""
    args: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": "int" if spec.data_type == "int" else "float",
        "symmetric": spec.sym,
        "strategy": strategy,
        "group_size": spec.group_size if strategy in ("group", "tensor_group") else None,
        "dynamic": dynamic,
    }
    if strategy == "block":
        args["block_structure"] = list(spec.group_size)
    scales = {"mx": "torch.uint8", "nv": "torch.float8_e4m3fn"}
    if spec.data_type[:2] in scales:
        args["scale_dtype"] = scales[spec.data_type[:2]]
    return args
