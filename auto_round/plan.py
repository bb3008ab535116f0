"""The plan: which layer gets which scheme, and why. Pure: nothing is written on the model.

Precedence of `layer_config` rules: exact layer name, then patterns in the order given (later ones win), then the
global scheme. `ignore_layers` wins over patterns. A rule that matches nothing is an error that lists near misses.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from auto_round.schemes import QuantizationScheme, parse_scheme
from auto_round.utils.patterns import PatternError, Patterns

MIN_COVERAGE = 0.95  # share of the blocks' weights that a plan must quantize unless rules say otherwise
PACK = 32  # int32 words hold 32 codes of any width in `bits` words, so both dimensions must be multiples of this

OUTSIDE = "(outside the blocks)"  # stands for a block's name where layers belong to none
DRAFT = "draft"  # the role of layers for multi-token prediction, which Transformers does not instantiate


class PlanError(ValueError):
    """Rules that do not fit the model, or a plan that the format cannot hold."""


@dataclass(frozen=True)
class LayerInfo:
    """A layer that could be quantized: `out` × `in` weight, the block it sits in (None: outside all blocks)."""

    name: str
    out_features: int
    in_features: int
    block: str | None
    tied: bool = False  # the weight is shared with another parameter (the input embedding)
    transposed: bool = False  # stored [in, out], as Conv1D does
    has_bias: bool = False
    dtype: torch.dtype = torch.bfloat16  # of the source weight
    role: str = ""  # "router": chooses among experts, and is kept; "embedding": looked up, not multiplied; DRAFT
    fused: bool = False  # cut out of a tensor that the source stores for all experts
    stored: str = ""  # what the checkpoint calls the layer, where that is another name

    @property
    def stem(self) -> str:
        """The name under which the layer's tensors are stored."""
        return self.stored or self.name

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one layer. `scheme.bits` of 16 keeps it; `reason` says why in words a person reads."""

    info: LayerInfo
    scheme: QuantizationScheme
    reason: str
    explicit: bool = False  # a rule of the user's says so

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def is_quantized(self) -> bool:
        return self.scheme.is_quantized


@dataclass(frozen=True)
class ModelPlan:
    """Decisions for every candidate layer, by name, and the blocks in the order in which they run."""

    scheme: QuantizationScheme
    layers: Mapping[str, LayerPlan]
    blocks: tuple[tuple[str, ...], ...]
    rules: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)  # stored name → why a matrix that is no layer is kept
    config: Any = None  # the model's configuration, as Transformers has it

    @property
    def block_names(self) -> tuple[str, ...]:
        return tuple(name for stack in self.blocks for name in stack)

    @property
    def stored_blocks(self) -> list[list[str]]:
        """The stacks under the names that the checkpoint has for them."""
        stems = {plan.info.block: plan for plan in reversed(self.layers.values()) if plan.info.block}
        return [[_stored_block(block, stems.get(block)) for block in stack] for stack in self.blocks]

    @property
    def parts(self) -> tuple[str, ...]:
        """Blocks in order, those for multi-token prediction, and `OUTSIDE`, as far as they hold layers to quantize."""
        return tuple(part for part in (*self.block_names, *self.drafts, OUTSIDE) if self.quantized(part))

    @property
    def drafts(self) -> tuple[str, ...]:
        """Blocks for multi-token prediction with layers to quantize, by their stored names; no modules of the model."""
        layers = self._quantized.get(None, {}).values()
        return tuple(dict.fromkeys(plan.info.block for plan in layers if plan.info.role == DRAFT))

    def without_drafts(self, reason: str) -> ModelPlan:
        """The plan for a format that leaves layers for multi-token prediction as they are, for this reason."""
        if not self.drafts:
            return self
        kept = {
            name: dataclasses.replace(plan, scheme=_keep(self.scheme), reason=f"{_DRAFT_WORDS}: {reason}")
            if plan.info.role == DRAFT and plan.is_quantized
            else plan
            for name, plan in self.layers.items()
        }
        return dataclasses.replace(self, layers=kept)

    def quantized(self, part: str | None = None) -> dict[str, LayerPlan]:
        """Layers that get quantized: all, or those of one block (or `OUTSIDE`)."""
        return dict(self._quantized.get(part, {}))

    @functools.cached_property
    def _quantized(self) -> dict[str | None, dict[str, LayerPlan]]:
        """By part, all of them under None: experts make tens of thousands, asked for block by block."""
        found: dict[str | None, dict[str, LayerPlan]] = {None: {}}
        for name, plan in self.layers.items():
            if plan.is_quantized:
                found[None][name] = plan
                found.setdefault(plan.info.block or OUTSIDE, {})[name] = plan
        return found

    def summary(self) -> str:
        """`Quantized 28/30 layers; kept 2: router: small, and it decides (a, b)`, of the layers in blocks."""
        inside = [plan for plan in self.layers.values() if plan.info.block is not None or plan.is_quantized]
        kept: dict[str, list[str]] = {}
        for plan in inside:
            if not plan.is_quantized:
                kept.setdefault(plan.reason, []).append(plan.name)
        text = f"Quantized {sum(plan.is_quantized for plan in inside)}/{len(inside)} layers"
        for reason, names in kept.items():
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            text += f"; kept {len(names)}: {reason} ({', '.join(names[:2])}{more})"
        return text

    def kept(self) -> dict[str, LayerPlan]:
        return {n: p for n, p in self.layers.items() if not p.is_quantized}


def _stored_block(block: str, layer: LayerPlan | None) -> str:
    """A block's stored name, read off one of its layers."""
    if layer is None or layer.info.stem == layer.name:
        return block
    inside = layer.name[len(block) :]
    if layer.info.stem.endswith(inside):
        return layer.info.stem[: -len(inside)]
    found = re.match(rf"(.*?\.{re.escape('.'.join(block.split('.')[-2:]))})\.", f".{layer.info.stem}")
    return found[1][1:] if found else block


def make_plan(
    layers: Sequence[LayerInfo],
    blocks: Sequence[Sequence[str]],
    scheme: QuantizationScheme,
    layer_config: Mapping[str, Any] | None = None,
    ignore_layers: Sequence[str] = (),
    lm_head: str | None = None,
    quant_lm_head: bool = False,
    beside: Mapping[str, str] | None = None,
    recipe: Mapping[str, tuple[QuantizationScheme, str] | tuple[QuantizationScheme, str, bool]] | None = None,
    config: Any = None,
) -> ModelPlan:
    """Decide every layer's scheme.

    Args:
        beside: matrices that are no layers and stay, with the reason.
        recipe: layer → (scheme, reason, whether the user wants it so) that takes the global scheme's place, as
            llama.cpp's mixtures and AutoScheme's choice do.
        config: the model's configuration, for formats that depend on the architecture.

    Raises:
        PlanError: a rule matches no layer, or asks for what cannot be (quantizing a tied lm_head).
    """
    names = [info.name for info in layers]
    rules = [(key, parse_scheme(value, scheme)) for key, value in (layer_config or {}).items()]
    hits = {key: match_layers(key, names) for key, _ in rules}
    ignored = {name: item for item in ignore_layers for name in match_layers(item, names)}
    decided = {}
    ruled = {name for matched in hits.values() for name in matched} | set(ignored)
    for info in layers:
        mixed = (recipe or {}).get(info.name)
        if mixed and info.name not in ruled and not info.tied and info.role != "router":
            decided[info.name] = LayerPlan(info, *mixed)
            continue
        wanted, reason, explicit = _wanted(info, scheme, rules, hits, ignored, lm_head, quant_lm_head)
        decided[info.name] = fit_scheme(info, wanted, reason, explicit)
    stacks = tuple(tuple(stack) for stack in blocks)
    plan = ModelPlan(scheme, decided, stacks, dict(rules), dict(beside or {}), config)
    _check_share(plan)
    return plan


def _check_share(plan: ModelPlan) -> None:
    """A run that would leave much of the blocks as it is, and nobody asked for that, is no quantization."""
    inside = [p for p in plan.layers.values() if p.info.block is not None and not p.info.role and not p.explicit]
    total, lost = sum(p.info.numel for p in inside), [p for p in inside if not p.is_quantized]
    missed = sum(p.info.numel for p in lost)
    if plan.scheme.is_quantized and missed > (1 - MIN_COVERAGE) * total:
        largest = max(lost, key=lambda p: p.info.numel)
        raise PlanError(
            f"Quantized {len(inside) - len(lost)}/{len(inside)} layers: only {100 * (total - missed) / total:.0f} % "
            f"of the block weights. {largest.name} stays: {largest.reason}. If that is what you want, say so with "
            f"ignore_layers={largest.name.rpartition('.')[2]!r}"
        )


def _wanted(info, scheme, rules, hits, ignored, lm_head, quant_lm_head):
    """(scheme, reason, explicit) before shapes are considered."""
    exact = next((value for key, value in rules if key == info.name), None)
    if exact is not None:
        return exact, f"layer_config {info.name!r}", True
    if info.name in ignored:
        return _keep(scheme), f"ignore_layers {ignored[info.name]!r}", True
    matched = [(key, value) for key, value in rules if info.name in hits[key]]
    if matched:
        return matched[-1][1], f"layer_config {matched[-1][0]!r}", True
    if info.role == DRAFT:
        return *_draft_scheme(scheme), False
    if info.role:
        return _keep(scheme), f"{info.role}: small, and it decides", False
    if info.block is not None:
        return scheme, "default", False
    if info.name == lm_head and quant_lm_head:
        return scheme, "quant_lm_head", True
    return _keep(scheme), "outside the blocks", False


_DRAFT_WORDS = "multi-token prediction"


def _draft_scheme(scheme: QuantizationScheme) -> tuple[QuantizationScheme, str]:
    """Eight bits in the run's own way where engines read both side by side: symmetric integers, weights alone."""
    if not scheme.is_quantized or scheme.data_type != "int" or not scheme.sym or scheme.act is not None:
        return _keep(scheme), f"{_DRAFT_WORDS}: kept, as engines have no 8 bits beside this scheme"
    wide = dataclasses.replace(scheme, bits=max(8, scheme.bits))
    return wide, f"{_DRAFT_WORDS}: 8 bits by rule, as no sample comes through it"


def _keep(scheme: QuantizationScheme) -> QuantizationScheme:
    return QuantizationScheme(16, scheme.group_size if isinstance(scheme.group_size, int) else -1, data_type="float")


def fit_scheme(info: LayerInfo, scheme: QuantizationScheme, reason: str, explicit: bool = False) -> LayerPlan:
    """Adjust a wanted scheme to the layer's shape, or keep the layer, saying so."""
    if not scheme.is_quantized:
        return LayerPlan(info, scheme, reason, explicit)
    if info.tied:
        if explicit:
            raise PlanError(
                f"{info.name} shares its weight with the input embedding (tie_word_embeddings), so it cannot be "
                "quantized on its own: leave it out of the rules, or untie the weights first"
            )
        return LayerPlan(info, _keep(scheme), "tied to the input embedding")
    misfit = _misfit(info, scheme)
    if misfit:
        return LayerPlan(info, _keep(scheme), f"shape {info.out_features}×{info.in_features} {misfit}")
    if info.block is None and scheme.needs_input_range:
        raise PlanError(
            f"{info.name} lies outside the blocks, where calibration does not see what enters a layer, and its scheme "
            "has a fixed scale for activations: give it a scheme for weights only, such as W8A16"
        )
    if scheme.data_type != "int":
        return LayerPlan(info, scheme, reason)
    group_size = fit_group_size(info.in_features, scheme.group_size)
    if group_size == scheme.group_size:
        return LayerPlan(info, scheme, reason)
    if scheme.group_size >= info.in_features:
        return LayerPlan(info, dataclasses.replace(scheme, group_size=group_size), reason)
    note = f"{reason}; group size {scheme.group_size} does not divide {info.in_features} inputs, {group_size} does"
    return LayerPlan(info, dataclasses.replace(scheme, group_size=group_size), note)


def _misfit(info: LayerInfo, scheme: QuantizationScheme) -> str:
    """Why no reader takes a layer of this shape in the scheme; empty if some do."""
    if info.out_features % PACK or info.in_features % PACK:
        return f"is not a multiple of {PACK} (no kernel reads it)"
    superblock = (scheme.super_group_size or 1) * scheme.group_size if scheme.super_bits else 1
    if info.in_features % superblock:
        return f"does not divide into super-blocks of {superblock} inputs"
    return ""


def fit_group_size(in_features: int, group_size: int) -> int:
    """The largest group size up to the wanted one that divides the inputs into multiples of 16; -1 if none does."""
    if group_size in (-1, 0):
        return group_size
    if group_size >= in_features:
        return -1
    for candidate in range(group_size, 15, -1):
        if in_features % candidate == 0 and (candidate == group_size or candidate % 16 == 0):
            return candidate
    return group_size if in_features % group_size == 0 else -1


_META = re.compile(r"\.\*|[\^$|()\[\]?+*]")


def match_layers(pattern: str, names: Sequence[str]) -> list[str]:
    """Names that a rule means: the exact name, a regular expression if it has such signs, else a part of the name.

    A part matches whole dotted components at its ends if it ends in a digit, so `layers.1` is not `layers.10`.

    Raises:
        PlanError: nothing matches, or the expression is not valid.
    """
    if pattern in names:
        return [pattern]
    patterns, expression = Patterns(f"the layer pattern {pattern!r}"), _as_regex(pattern)
    try:
        found = [name for name in names if patterns.search(expression, name)]
    except PatternError as error:
        raise PlanError(str(error)) from error
    if not found:
        raise PlanError(f"the layer pattern {pattern!r} matches no layer{near_misses(pattern, names)}")
    return found


def _as_regex(pattern: str) -> str:
    if not _META.search(pattern):
        return re.escape(pattern) + (r"(?!\d)" if pattern[-1:].isdigit() else "")
    # Dots outside `.*` mean themselves: people write layer names, not expressions.
    return re.sub(r"\.(?![*+?])", r"\\.", pattern.replace(r"\.", "."))


def near_misses(pattern: str, names: Sequence[str]) -> str:
    """`; nearest: a, b` from the names and their last components."""
    parts = {part for name in names for part in (name, name.rsplit(".", 1)[-1])}
    close = difflib.get_close_matches(pattern, sorted(parts), n=3, cutoff=0.4)
    return "; nearest: " + ", ".join(close) if close else f"; the layers are {', '.join(list(names)[:3])}, …"
