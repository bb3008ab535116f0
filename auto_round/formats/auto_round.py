"""The `auto_round` format: integer codes packed into int32 words beside float16 scales, for every width 2 to 8.

A quantized layer [out, in] becomes `qweight`, `qzeros` and `scales` (layouts and shapes: `packing.py`); one of three
packings holds for the whole checkpoint and is chosen from the plan:

- all layers symmetric: `auto_round:auto_gptq`, which the most readers know;
- all layers 4-bit asymmetric: `auto_round:auto_awq`;
- anything else: `auto_round`, the GPTQ layout with zero points stored as they are.

`auto_round:gptqmodel` is the last one with a `g_idx` (input → group) beside it, only on request. One scale for a whole
tensor (group size 0) is stored as one per output row, as readers know no group size 0.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from auto_round.data_type.base import QuantizedTensor, group_count
from auto_round.formats import packing as layouts
from auto_round.formats.base import TensorShape
from auto_round.plan import LayerInfo, LayerPlan, ModelPlan, PlanError
from auto_round.schemes import QuantizationScheme

KEPT = {"bits": 16, "data_type": "float"}
_RESERVED = ("quant_method", "packing_format", "extra_config", "block_name_to_quantize", "autoround_version")


class AutoRoundFormat:
    """Packs a plan's layers. A name with a packing ("auto_round:auto_awq") fixes it; "auto_round" chooses one."""

    def __init__(self, plan: ModelPlan, name: str = "auto_round"):
        schemes = [layer.scheme for layer in plan.quantized().values()]
        if not schemes:
            raise PlanError("the plan quantizes no layer, so there is nothing to export as auto_round")
        self.packing = _choose_packing(schemes) if name == "auto_round" else _known_packing(name)
        _check_packing(self.packing, plan.quantized().values())
        self.plan = plan
        self.name = name

    def layout(self, layer: LayerPlan) -> dict[str, TensorShape]:
        """Shapes: `packing.packed_shapes`; int32 words, float16 scales, int32 g_idx [in]."""
        info, scheme = layer.info, layer.scheme
        groups = group_count(info.in_features, scheme.group_size)
        shapes = layouts.packed_shapes(self.packing, info.out_features, info.in_features, groups, scheme.bits)
        dtypes = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}
        found = {suffix: TensorShape(shape, dtypes[suffix]) for suffix, shape in shapes.items()}
        if self.packing == layouts.GPTQMODEL:
            found["g_idx"] = TensorShape((info.in_features,), torch.int32)
        return found

    def pack(self, tensor: QuantizedTensor, info: LayerInfo) -> dict[str, torch.Tensor]:
        if tensor.codes.shape != (info.out_features, info.in_features):
            raise ValueError(f"{info.name}: codes {tuple(tensor.codes.shape)} do not fit the layer")
        tensor = tensor.per_row()
        bits = tensor.spec.bits
        zeros = tensor.zero_point
        if zeros is None:
            zeros = torch.full_like(tensor.scale, 1 << (bits - 1), dtype=torch.uint8)
        elif self.packing == layouts.AUTO_GPTQ and (zeros == 0).any():
            raise ValueError(f"{info.name}: a zero point of 0 cannot be stored as -1 in {self.packing}")
        packed = layouts.encode(self.packing, tensor.codes, zeros, bits)
        packed["scales"] = tensor.scale.t().contiguous()
        if self.packing == layouts.GPTQMODEL:
            packed["g_idx"] = torch.arange(info.in_features, dtype=torch.int32) // tensor.group_size
        return packed

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: LayerPlan) -> QuantizedTensor:
        """The inverse of `pack`; a tensor with one scale comes back as `QuantizedTensor.per_row()`."""
        spec = dataclasses.replace(layer.scheme.weight, group_size=_stored_group_size(layer.scheme))
        codes = layouts.decode_codes(self.packing, tensors["qweight"], spec.bits)
        zeros = layouts.decode_zeros(self.packing, tensors["qzeros"], spec.bits)
        if spec.sym and (zeros != 1 << (spec.bits - 1)).any():
            raise ValueError(f"{layer.name}: zero points of a symmetric layer are not all {1 << (spec.bits - 1)}")
        scale = tensors["scales"].t().contiguous()
        return QuantizedTensor(codes, scale, None if spec.sym else zeros.to(torch.uint8), spec)

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`quantization_config`; `settings` are recorded in it unless None."""
        top = _top_scheme(self.plan)
        prefixes = block_prefixes(self.plan.stored_blocks)
        config = _scheme_fields(top)
        config.update({k: v for k, v in settings.items() if v is not None and k not in (*config, *_RESERVED)})
        config["autoround_version"] = _version()
        if prefixes:
            config["block_name_to_quantize"] = ",".join(prefixes)
        config["quant_method"] = "auto-round"
        config["packing_format"] = self.packing
        extra = _extra_config(self.plan, top, prefixes)
        if extra:
            config["extra_config"] = extra
        return config


def block_prefixes(stacks: Iterable[Sequence[str]]) -> list[str]:
    """The common dotted prefix of each stack of blocks, or the blocks themselves if they share none."""
    prefixes: list[str] = []
    for stack in stacks:
        levels = zip(*(name.split(".") for name in stack), strict=False)
        common = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, levels)]
        prefixes.extend([".".join(common)] if common else stack)
    return list(dict.fromkeys(prefixes))


def _choose_packing(schemes: Sequence[QuantizationScheme]) -> str:
    if all(scheme.sym for scheme in schemes):
        return layouts.AUTO_GPTQ
    if all(scheme.bits == 4 and not scheme.sym for scheme in schemes):
        return layouts.AUTO_AWQ
    return layouts.PLAIN


def _known_packing(name: str) -> str:
    try:
        return layouts.normalize_packing(name)
    except ValueError as error:
        raise PlanError(str(error)) from error


def _check_packing(packing: str, layers: Iterable[LayerPlan]) -> None:
    """Refuse an explicit packing that cannot hold a layer, naming it."""
    for layer in layers:
        scheme = layer.scheme
        if packing == layouts.AUTO_AWQ and scheme.bits != 4:
            raise PlanError(
                f"{packing} holds 4-bit layers only, and {layer.name} has {scheme.bits} bits: use auto_round"
            )
        if packing == layouts.AUTO_GPTQ and not scheme.sym:
            raise PlanError(
                f"{packing} stores zero points one too low, so it cannot hold the zero point 0 of an asymmetric layer "
                f"such as {layer.name}: use auto_round, or auto_round:auto_awq for 4 bits"
            )


def _stored_group_size(scheme: QuantizationScheme) -> int:
    return scheme.group_size or -1


def _scheme_fields(scheme: QuantizationScheme) -> dict[str, Any]:
    """The fields that a reader needs; activations appear only where they are quantized."""
    fields = {
        "bits": scheme.bits,
        "data_type": scheme.data_type,
        "group_size": _stored_group_size(scheme),
        "sym": scheme.sym,
    }
    if (scheme.act_bits or 16) < 16:
        fields.update({k: v for k, v in scheme.items() if k.startswith("act_") and v is not None})
    return fields


def _top_scheme(plan: ModelPlan) -> QuantizationScheme:
    """The scheme that the config states first: the plan's, or the commonest if no layer has that one."""
    counts = Counter(layer.scheme for layer in plan.quantized().values())
    return plan.scheme if plan.scheme in counts else counts.most_common(1)[0][0]


def _extra_config(plan: ModelPlan, top: QuantizationScheme, prefixes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Exact layer name → what differs from the top level; the full scheme for layers outside the blocks.

    Readers take every layer whose name starts with a block prefix, so a kept layer that does is listed even if it
    belongs to no block.
    """
    common = _scheme_fields(top)
    extra: dict[str, dict[str, Any]] = {}
    kept = [*plan.beside, *(layer.info.stem for layer in plan.kept().values())]
    extra.update({name: dict(KEPT) for name in kept if any(name.startswith(prefix) for prefix in prefixes)})
    for layer in plan.quantized().values():
        name = layer.info.stem
        fields = _scheme_fields(layer.scheme)
        if layer.info.block is not None:
            fields = {key: value for key, value in fields.items() if common.get(key) != value}
        if fields:
            extra[name] = fields
    return extra


def _version() -> str:
    try:
        return version("auto-round")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0.0.0"
