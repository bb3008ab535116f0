"""The `mlx` format: packed integers as mlx-lm reads them, 2 to 6 and 8 bits, widths mixed as one likes.

A quantized layer [out, in] becomes

    weight  uint32 [out, in·bits/32]  codes as a bit stream along the inputs (`packing.pack_bits`)
    scales  [out, groups]             in the dtype of the model
    biases  [out, groups]             -scale · zero point, in the same dtype

and MLX computes `scales · code + biases`. It computes in the widest dtype that it meets, so float16 scales would turn a
bfloat16 model, with its cache, into a float32 one. That is why scales take the model's dtype, which rounds in two ways:

- A float16 or float32 model gets the scales as tuned; in a bfloat16 one they move by up to 1/256 of themselves.
- The bias of a symmetric layer is the scale times a power of two, hence exact. That of an asymmetric layer is rounded:
  by up to 6 % of a step with 4 bits in bfloat16, and by a whole step with 8 bits, which is why that is refused.

The names are those of the source, which mlx-lm maps to its own, except for experts of models in
`mlx_models.EXPERT_NAMES`: their tensors, also those that are kept, are slices of tensors [experts, ...] under mlx-lm's
names. Facts are from mlx-lm 0.32.2 and mlx 0.32.4.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from auto_round.data_type.base import QuantizedTensor, group_count
from auto_round.formats.base import ExportFormat, Place, TensorShape
from auto_round.formats.mlx_config import head_dim, with_known_fields
from auto_round.formats.mlx_models import EXPERT, EXPERT_NAMES, MLX_LM, MODEL_TYPES, REPACKS_KV_B, STACKS_EXPERTS
from auto_round.formats.packing import pack_bits, unpack_bits
from auto_round.plan import LayerInfo, LayerPlan, ModelPlan, PlanError

WIDTHS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (128, 64, 32)


class MlxFormat(ExportFormat):
    """Packs a plan's layers for mlx-lm."""

    def __init__(self, plan: ModelPlan, name: str = "mlx"):
        layers = plan.quantized()
        if not layers:
            raise PlanError(f"the plan quantizes no layer, so there is nothing to export as {name}")
        for layer in layers.values():
            reason = _objection(layer)
            if reason is not None:
                raise PlanError(f"{name} cannot hold {layer.name}: {reason}")
        self.counts = _check_experts(plan.layers.values(), name)
        self.kind = plan.config.model_type if plan.config is not None else None
        self.names = EXPERT_NAMES.get(self.kind)
        if self.kind is not None:
            _check_model(plan.layers.values(), self.kind)
        self.plan = plan
        self.name = name

    def layout(self, layer: LayerPlan) -> dict[str, TensorShape]:
        info, bits = layer.info, layer.scheme.bits
        groups = (info.out_features, group_count(info.in_features, layer.scheme.group_size))
        return {
            "weight": TensorShape((info.out_features, info.in_features * bits // 32), torch.uint32),
            "scales": TensorShape(groups, _float_dtype(info)),
            "biases": TensorShape(groups, _float_dtype(info)),
        }

    def place(self, info: LayerInfo, suffix: str) -> Place | None:
        """The slice of a stacked tensor that an expert's tensor becomes, where mlx-lm does not stack it itself."""
        if self.names is None or suffix in self.names.loads:
            return None
        stem, index = self.names.place(info.stem)
        return Place(f"{stem}.{suffix}", index, self.counts[_projection(info)] if index is not None else None)

    def pack(self, tensor: QuantizedTensor, info: LayerInfo) -> dict[str, torch.Tensor]:
        """Rounds scales and biases to the model's dtype (see above); moves codes as they are.

        Raises:
            ValueError: codes of another shape, or values beyond what a float16 model can hold.
        """
        if tensor.codes.shape != (info.out_features, info.in_features):
            raise ValueError(f"{info.name}: codes {tuple(tensor.codes.shape)} do not fit the layer")
        tensor = tensor.per_row()
        scales, biases = _scales_and_biases(tensor, _float_dtype(info))
        if not (scales.isfinite().all() and biases.isfinite().all()):
            dtype = str(scales.dtype).removeprefix("torch.")
            raise ValueError(
                f"{info.name}: a scale or bias is too large for {dtype}, the model's dtype: keep this layer"
            )
        words = pack_bits(tensor.codes, tensor.spec.bits).view(torch.uint32)
        return {"weight": words, "scales": scales, "biases": biases}

    def as_read(self, tensor: QuantizedTensor, info: LayerInfo, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """float32 [out, in]: what readers make of a packed layer, after the rounding that `pack` does."""
        scales, biases = _scales_and_biases(tensor.per_row(), _float_dtype(info))
        groups = tensor.codes.view(*scales.shape, -1).float()
        return (groups * scales.float().unsqueeze(-1) + biases.float().unsqueeze(-1)).view(tensor.codes.shape)

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: LayerPlan) -> QuantizedTensor:
        """The inverse of `pack`, with scales as rounded there; one scale for all comes back as one per row."""
        spec = dataclasses.replace(layer.scheme.weight, group_size=layer.scheme.group_size or -1)
        codes = unpack_bits(tensors["weight"].view(torch.int32), spec.bits)
        scales, biases = tensors["scales"].float(), tensors["biases"].float()
        zeros = (-biases / scales).round()
        if spec.sym and (zeros != 1 << (spec.bits - 1)).any():
            raise ValueError(f"{layer.name}: biases of a symmetric layer are not all -{1 << (spec.bits - 1)} · scales")
        return QuantizedTensor(codes, scales.half(), None if spec.sym else zeros.to(torch.uint8), spec)

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What mlx-lm reads as `quantization`: the commonest scheme, exact names of layers that differ or are kept.

        Settings are left to report.json, as every key but the first two would be taken for a layer.
        """
        fields = {self._read_as(layer.info): _fields(layer) for layer in self.plan.quantized().values()}
        top = dict(Counter(tuple(values.items()) for values in fields.values()).most_common(1)[0][0])
        kept = [*self.plan.beside, *(self._read_as(layer.info) for layer in self.plan.kept().values())]
        return {
            **top,
            **dict.fromkeys(kept, False),
            **{stem: values for stem, values in fields.items() if values != top},
        }

    def _read_as(self, info: LayerInfo) -> str:
        """The name of a layer as mlx-lm knows it when it looks for its width."""
        return info.stem if self.names is None else self.names.place(info.stem)[0]

    def adapt_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The model's config.json as mlx-lm needs it; nothing is taken away, so Transformers reads it as before.

        Raises:
            PlanError: mlx-lm has no module for this type, or its loader cannot take what the plan quantizes.
        """
        kind = str(config.get("model_type"))
        _check_model(self.plan.layers.values(), kind)
        if EXPERT_NAMES.get(kind) != self.names:
            raise PlanError(f"config.json says model_type {kind!r}, and the plan was made for a {self.kind} model")
        adapted = with_known_fields(config)
        if (width := head_dim(config, self.plan.config)) is not None:
            adapted["head_dim"] = width
        head = next((layer.info for layer in self.plan.layers.values() if layer.info.stem == "lm_head"), None)
        if head is not None:  # mlx-lm and Transformers have different defaults for it
            adapted.setdefault("tie_word_embeddings", head.tied)
        adapted["quantization"] = self.config({})
        return adapted


def _objection(layer: LayerPlan) -> str | None:
    """Why MLX cannot hold a layer, and what it could; None if it can."""
    info, scheme = layer.info, layer.scheme
    if scheme.data_type != "int" or (scheme.act_bits or 16) < 16:
        return (
            f"it holds integer weights with unquantized activations, not data_type {scheme.data_type!r} with act_bits "
            f"{scheme.act_bits or 16}; use a scheme such as W4A16G64"
        )
    if info.transposed:
        return "mlx-lm turns the weights of a Conv1D as if they were floats; use auto_round"
    if scheme.bits not in WIDTHS:
        return f"MLX has no {scheme.bits}-bit kernels; use 6 or 8 bits"
    size = _group_size(layer)
    if size not in GROUP_SIZES:
        fits = " or ".join(str(known) for known in GROUP_SIZES if info.in_features % known == 0)
        return f"MLX has no kernels for a group size of {size}, and the layer has {info.in_features} inputs; use {fits}"
    if scheme.bits == 8 and not scheme.sym and _float_dtype(info) == torch.bfloat16:
        return "bfloat16 is too coarse for the offsets of an asymmetric 8-bit layer; use sym=True, or 6 bits"
    return None


def _check_model(layers: Iterable[LayerPlan], kind: str) -> None:
    """Refuse a `model_type` that mlx-lm does not load, or of which it cannot load the layers to quantize."""
    if kind not in MODEL_TYPES:
        close = difflib.get_close_matches(kind, MODEL_TYPES, n=1, cutoff=0.6)
        nearest = f" (the nearest that it loads is {close[0]})" if close else ""
        raise PlanError(f"mlx-lm {MLX_LM} does not load models of type {kind!r}{nearest}: use another format")
    for layer in layers:
        is_written = layer.is_quantized or layer.info.fused  # as another tensor than the source's
        if is_written and EXPERT.match(layer.info.stem) and kind not in STACKS_EXPERTS | EXPERT_NAMES.keys():
            remedy = "" if layer.info.fused else "keep experts with ignore_layers='experts', or "
            raise PlanError(
                f"mlx-lm {MLX_LM} stacks experts of {kind} models only as floats, so {layer.name} has no "
                f"place: {remedy}use another format"
            )
        if layer.is_quantized and layer.info.stem.endswith(".kv_b_proj") and kind in REPACKS_KV_B:
            raise PlanError(
                f"mlx-lm {MLX_LM} would split {layer.name} of {kind} models and round it a second time: keep it with "
                "ignore_layers='kv_b_proj', or use another format"
            )


def _projection(info: LayerInfo) -> str | None:
    """An expert's layer without the expert's number, which stands for those that mlx-lm stacks; None for others."""
    expert = EXPERT.match(info.stem)
    return None if expert is None else f"{expert[1]}.experts.{expert[3]}"


def _check_experts(layers: Iterable[LayerPlan], name: str) -> dict[str, int]:
    """Number of experts by projection; mlx-lm makes one tensor of them, so they need one scheme."""
    first: dict[str, LayerPlan] = {}
    counts: Counter[str] = Counter()
    for layer in layers:
        projection = _projection(layer.info)
        if projection is None:
            continue
        counts[projection] += 1
        other = first.setdefault(projection, layer)
        if layer.is_quantized != other.is_quantized or (layer.is_quantized and _fields(layer) != _fields(other)):
            raise PlanError(
                f"{name}: mlx-lm makes one tensor of the experts in {projection}, and {layer.name} has another scheme "
                f"than {other.name}: give all of them the same, or keep them all"
            )
    return dict(counts)


def _fields(layer: LayerPlan) -> dict[str, int]:
    return {"group_size": _group_size(layer), "bits": layer.scheme.bits}


def _group_size(layer: LayerPlan) -> int:
    """Inputs that share a scale, as stored: a whole row where the scheme has one scale per row or tensor."""
    size = layer.scheme.group_size
    return size if isinstance(size, int) and size > 0 else layer.info.in_features


def _float_dtype(info: LayerInfo) -> torch.dtype:
    return info.dtype if info.dtype in (torch.float16, torch.float32) else torch.bfloat16


def _scales_and_biases(tensor: QuantizedTensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, groups] each. The bias is made of the rounded scale, so that the zero point still means zero."""
    scales = tensor.scale.to(dtype).contiguous()
    zero = float(1 << (tensor.spec.bits - 1)) if tensor.zero_point is None else tensor.zero_point.float()
    return scales, (-scales.float() * zero).to(dtype).contiguous()
