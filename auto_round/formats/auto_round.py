"""The `auto_round` format: every scheme but llama.cpp's, for the readers that know AutoRound.

Plain integers of 2 to 8 bits are packed into int32 words: a quantized layer [out, in] becomes `qweight`, `qzeros` and
`scales` (layouts and shapes: `packing.py`). One of three packings holds for all of them, chosen from the plan:

- all layers symmetric: `auto_round:auto_gptq`, which the most readers know;
- all layers 4-bit asymmetric: `auto_round:auto_awq`;
- anything else: `auto_round`, the GPTQ layout with zero points stored as they are.

`auto_round:gptqmodel` is the last one with a `g_idx` (input → group) beside it, only on request. One scale for a whole
tensor (group size 0) is stored as one per output row, as readers know no group size 0.

All other layers have a packing that follows from their scheme (`float_layouts.float_packing`), with real codes:

- MXFP4, MXFP8, NVFP4: `auto_round:llm_compressor`, the tensors of that format;
- float8: `auto_round:fp8_static` with a fixed scale for inputs, else `auto_round:fp8` (rows, blocks);
- MXINT4: written as `auto_round`, as its other readers know it;
- INT8 with inputs in 8 bits: `auto_round:int8`, a `weight` in int8 and a `weight_scale` float16 [out, 1].

`packing_format` names the integers' packing if there are any, else that of the commonest scheme. Transformers refuses a
group size that is 0 or a list, so blocks of float8 are said with `weight_block_size` beside a `group_size` of their
width.
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
from auto_round.formats.base import ExportFormat, TensorShape
from auto_round.formats.float_layouts import AUTO_ROUND_PACKINGS, MXINT4, auto_round_layout, float_packing
from auto_round.plan import LayerInfo, LayerPlan, ModelPlan, PlanError
from auto_round.schemes import QuantizationScheme

KEPT = {"bits": 16, "data_type": "float"}
_RESERVED = ("quant_method", "packing_format", "extra_config", "block_name_to_quantize", "autoround_version")


class AutoRoundFormat(ExportFormat):
    """Packs a plan's layers. A name with a packing ("auto_round:auto_awq") fixes it; "auto_round" chooses one."""

    def __init__(self, plan: ModelPlan, name: str = "auto_round"):
        layers = plan.quantized().values()
        if not layers:
            raise PlanError("the plan quantizes no layer, so there is nothing to export as auto_round")
        integers = [layer for layer in layers if _own_packing(layer) is None]
        if name == "auto_round":
            self.packing = _choose_packing([layer.scheme for layer in integers]) if integers else None
        elif name in AUTO_ROUND_PACKINGS:
            self.packing = None
            _check_own_packing(name, layers)
        else:
            self.packing = _known_packing(name)
            _check_integers(self.packing, layers)
        self.plan = plan
        self.name = name
        for layer in layers:
            self._refuse_renamed_expert(layer)

    def _refuse_renamed_expert(self, layer: LayerPlan) -> None:
        """Transformers fuses what is called `weight` in experts that it renames, before packed layers see it."""
        stem = layer.info.stem
        if stem != layer.name and ".experts." in stem and "weight" in self.layout(layer):
            raise PlanError(
                f"{self.name}: Transformers does not load the experts of this model, such as {stem}, in "
                f"{layer.scheme.data_type} of {layer.scheme.bits} bits from this format: use llm_compressor or fp8 for "
                "float8, a 4-bit scheme, or keep them with ignore_layers='experts'"
            )

    def layout(self, layer: LayerPlan) -> dict[str, TensorShape]:
        """Shapes: `float_layouts`, or `packing.packed_shapes`; int32 words, float16 scales, int32 g_idx [in]."""
        info, scheme = layer.info, layer.scheme
        own = float_packing(layer.scheme)
        if own is not None:
            return auto_round_layout(own, scheme).shapes(info.out_features, info.in_features, scheme)
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
        scheme = self.plan.layers[info.name].scheme
        own = float_packing(scheme)
        if own is not None:
            return auto_round_layout(own, scheme).pack(tensor, scheme, info.name)
        return self._pack_integers(tensor.per_row(), info)

    def _pack_integers(self, tensor: QuantizedTensor, info: LayerInfo) -> dict[str, torch.Tensor]:
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
        own = float_packing(layer.scheme)
        if own is not None:
            return auto_round_layout(own, layer.scheme).unpack(tensors, layer.scheme)
        spec = dataclasses.replace(layer.scheme.weight, group_size=_stored_group_size(layer.scheme))
        codes = layouts.decode_codes(self.packing, tensors["qweight"], spec.bits)
        zeros = layouts.decode_zeros(self.packing, tensors["qzeros"], spec.bits)
        if spec.sym and (zeros != 1 << (spec.bits - 1)).any():
            raise ValueError(f"{layer.name}: zero points of a symmetric layer are not all {1 << (spec.bits - 1)}")
        scale = tensors["scales"].t().contiguous()
        return QuantizedTensor(codes, scale, None if spec.sym else zeros.to(torch.uint8), spec)

    def pack_attention(self, scale: torch.Tensor, per_head: bool) -> torch.Tensor:
        """A scale of attention, float32 [1] or [heads], as it is; `config` says by its settings that there are some."""
        return scale

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
        config["packing_format"] = self.packing or _published(float_packing(top))
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


def _own_packing(layer: LayerPlan) -> str | None:
    """The packing of a layer that is no plain integers, else None.

    Raises:
        PlanError: no packing holds the layer.
    """
    try:
        return float_packing(layer.scheme)
    except ValueError as error:
        raise PlanError(f"auto_round cannot hold {layer.name}: {error}") from error


def _check_own_packing(wanted: str, layers: Iterable[LayerPlan]) -> None:
    """Refuse an explicit packing of what is no plain integers where layers have another one, naming the first."""
    for layer in layers:
        other = _own_packing(layer)
        if other != wanted:
            raise PlanError(
                f"{wanted} cannot hold {layer.name}, whose scheme is stored as {other or 'packed integers'}: use "
                "auto_round, which chooses"
            )


def _check_integers(wanted: str, layers: Iterable[LayerPlan]) -> None:
    """Refuse an explicit packing of integers that cannot hold a layer, naming it."""
    for layer in layers:
        scheme = layer.scheme
        if _own_packing(layer) is not None:
            raise PlanError(
                f"{wanted} holds plain integers only, and {layer.name} has {scheme.data_type!r} of {scheme.bits} bits "
                f"with inputs of {scheme.act_bits or 16}: use auto_round"
            )
        if wanted == layouts.AUTO_AWQ and scheme.bits != 4:
            raise PlanError(
                f"{wanted} holds 4-bit layers only, and {layer.name} has {scheme.bits} bits: use auto_round"
            )
        if wanted == layouts.AUTO_GPTQ and not scheme.sym:
            raise PlanError(
                f"{wanted} stores zero points one too low, so it cannot hold the zero point 0 of an asymmetric layer "
                f"such as {layer.name}: use auto_round, or auto_round:auto_awq for 4 bits"
            )


def _published(packing: str) -> str:
    """What other readers call a packing: they tell MXINT4 from integers by its data_type."""
    return layouts.PLAIN if packing == MXINT4 else packing


def _stored_group_size(scheme: QuantizationScheme) -> int:
    """The group size in the form that Transformers accepts."""
    return scheme.group_size[1] if isinstance(scheme.group_size, tuple) else scheme.group_size or -1


def _scheme_fields(scheme: QuantizationScheme) -> dict[str, Any]:
    """The fields that a reader needs; activations appear only where they are quantized."""
    fields: dict[str, Any] = {
        "bits": scheme.bits,
        "data_type": scheme.data_type,
        "group_size": _stored_group_size(scheme),
        "sym": scheme.sym,
    }
    if isinstance(scheme.group_size, tuple):
        fields["weight_block_size"] = list(scheme.group_size)
    if scheme.act is not None:
        fields.update({k: v for k, v in scheme.items() if k.startswith("act_") and v is not None})
    return fields


def _full_fields(scheme: QuantizationScheme, common: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a layer that says all of its own, with what it must not take over from the top level blanked."""
    blank: dict[str, Any] = dict.fromkeys(key for key in common if key.startswith("act_") or key == "weight_block_size")
    if "act_bits" in blank:
        blank["act_bits"] = 16
    return {**blank, **_scheme_fields(scheme)}


def _top_scheme(plan: ModelPlan) -> QuantizationScheme:
    """The scheme that the config states first: the plan's, or the commonest if no layer has that one."""
    counts = Counter(layer.scheme for layer in plan.quantized().values())
    return plan.scheme if plan.scheme in counts else counts.most_common(1)[0][0]


def _extra_config(plan: ModelPlan, top: QuantizationScheme, prefixes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Exact layer name → what differs from the top level; the full scheme for another family, or outside the blocks.

    Readers take every layer whose name starts with a block prefix, so a kept layer that does is listed even if it
    belongs to no block.
    """
    common = _scheme_fields(top)
    extra: dict[str, dict[str, Any]] = {}
    kept = [*plan.beside, *(layer.info.stem for layer in plan.kept().values())]
    extra.update({name: dict(KEPT) for name in kept if any(name.startswith(prefix) for prefix in prefixes)})
    for layer in plan.quantized().values():
        name = layer.info.stem
        fields = _full_fields(layer.scheme, common)
        alike = fields["data_type"] == common["data_type"] and fields.keys() == common.keys()
        if layer.info.block is not None and alike:
            fields = {key: value for key, value in fields.items() if common[key] != value}
        if fields:
            extra[name] = fields
    return extra


def _version() -> str:
    try:
        return version("auto-round")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0.0.0"
