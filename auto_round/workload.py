"""What a run has to do, in numbers: sizes read off the plan, the settings and the model's configuration.

No weight is looked at, so a model whose parameters are on the meta device does. `estimate.py` and `speed.py` work from
these numbers alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.budget import Working
from auto_round.calibration.block_io import micro_batch
from auto_round.calibration.feed import vocabulary_size
from auto_round.compressors.experts import expert_groups
from auto_round.compressors.samples import CHECK_LOGIT_BYTES, CHECK_SAMPLES, CHECK_TOKENS
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import OUTSIDE, LayerPlan, ModelPlan
from auto_round.settings import TuneSettings
from auto_round.speed import Glue, LayerShape
from auto_round.utils.common import walk, walk_parameters

TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


@dataclass(frozen=True)
class Experts:
    """Of one block: how many experts it has, and how many of them a token visits."""

    count: int
    chosen: int


@dataclass(frozen=True)
class BlockKind:
    """Blocks of equal cost.

    names: of them. layers: shape → how many a block has, and the share of tokens that reaches each.
    nbytes: of all parameters in memory. quantized: weights that get codes. stored: bytes of their codes and scales in
    the work folder. largest: weights of the largest layer. channels: outputs of all layers that a token passes.
    """

    names: tuple[str, ...]
    layers: Mapping[LayerShape, tuple[int, float]]
    nbytes: int
    quantized: int
    stored: int
    largest: int
    channels: int
    widest: int
    experts: Experts | None


@dataclass(frozen=True)
class Workload:
    """A run in numbers.

    outside_bytes: of the parameters outside blocks, of which embedding_bytes are looked up and not multiplied.
    head: weights of the output layer. micro: tokens of one forward. check_tokens: on which original and result are
    compared. noisy: whether the quantized model's own activations are followed, too. moments: bytes that the algorithm
    keeps of each weight between steps.
    """

    blocks: tuple[BlockKind, ...]
    outside_bytes: int
    embedding_bytes: int
    outside_stored: int
    head: LayerShape | None
    vocabulary: int
    glue: Glue
    itemsize: int
    device: torch.device
    samples: int
    length: int
    micro: int
    check_tokens: int
    tune: TuneSettings
    needs_data: bool
    moments: int = 2

    @property
    def tokens(self) -> int:
        """Of the calibration set."""
        return self.samples * self.length if self.needs_data else 0

    @property
    def noisy(self) -> bool:
        return self.tune.enable_quanted_input and self.tune.iters > 0

    @property
    def shapes(self) -> list[LayerShape]:
        found = dict.fromkeys(shape for kind in self.blocks for shape in kind.layers)
        return list(found) + ([self.head] if self.head is not None else [])


def workload(
    streamed: StreamedModel,
    plan: ModelPlan,
    tune: TuneSettings,
    samples: int,
    length: int,
    needs_data: bool,
    working: Working | None = None,
    moments: int = 2,
) -> Workload:
    """The numbers of a run over `samples` samples of `length` tokens. working: None for the usual micro-batch."""
    model, device = streamed.model, streamed.device
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    spread = expert_spread(plan, config)
    together = (working or Working()).micro(min(micro_batch([length], device, tune.batch_size, spread), samples))
    micro = together * length if needs_data else CHECK_TOKENS
    members: dict[str, list[LayerPlan]] = {name: [] for name in plan.block_names}
    outside: list[LayerPlan] = []
    for layer in plan.layers.values():
        members.get(layer.info.block or OUTSIDE, outside).append(layer)
    vocabulary = vocabulary_size(model)
    head = next((one for one in outside if one.info.out_features == vocabulary and one.info.role != "embedding"), None)
    check = max(CHECK_SAMPLES * 16, min(CHECK_TOKENS, CHECK_LOGIT_BYTES // (4 * vocabulary)))
    blocks = _kinds(streamed, members, config, micro)
    itemsize = getattr(model, "dtype", torch.float32).itemsize
    inside = sum(kind.nbytes * len(kind.names) for kind in blocks)
    others = [name for name in streamed.blocks if name not in members]
    inside += sum(_nbytes(model.get_submodule(name)) for name in others)
    return Workload(
        blocks=blocks,
        outside_bytes=_nbytes(model) - inside,
        embedding_bytes=sum(p.nbytes for p in _tables(model)),
        outside_stored=sum(map(_stored, outside)),
        head=LayerShape(head.info.out_features, head.info.in_features, None, CHECK_TOKENS) if head else None,
        vocabulary=vocabulary,
        glue=_glue(config, blocks, length if needs_data else CHECK_TOKENS // CHECK_SAMPLES),
        itemsize=itemsize,
        device=device,
        samples=samples,
        length=length,
        micro=micro,
        check_tokens=min(check, CHECK_SAMPLES * length),
        tune=tune,
        needs_data=needs_data,
        moments=moments,
    )


def _nbytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.dtype.itemsize for _, parameter in walk_parameters(module))


def _tables(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Weights of token embeddings that no layer multiplies with."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    found = [module.weight for _, module in walk(model) if isinstance(module, torch.nn.Embedding)]
    return [weight for weight in found if output is None or weight is not getattr(output, "weight", None)]


def _chosen(config: Any) -> int:
    """Experts that a token visits; 0 where there are none."""
    return next((v for name in TOP_K if (v := _value(config, name)) is not None), 0)


def expert_spread(plan: ModelPlan, config: Any) -> float:
    """Experts of a block for each that a token visits, of the block with the most; 1 for a model without experts."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    chosen = _chosen(config)
    groups = expert_groups(plan.layers) if chosen else {}
    return max((len(names) / chosen for names in groups.values()), default=1.0)


def _kinds(
    streamed: StreamedModel, members: Mapping[str, list[LayerPlan]], config: Any, micro: int
) -> tuple[BlockKind, ...]:
    """Blocks by what is in them; those that cost the same are counted together."""
    alike: dict[tuple, list[str]] = {}
    for block, layers in members.items():
        key = Counter((one.info.out_features, one.info.in_features, one.scheme.weight) for one in layers)
        alike.setdefault((frozenset(key.items()), _nbytes(streamed.model.get_submodule(block))), []).append(block)
    chosen = _chosen(config)
    return tuple(_kind(tuple(names), members[names[0]], key[1], chosen, micro) for key, names in alike.items())


def _kind(names: tuple[str, ...], layers: list[LayerPlan], nbytes: int, chosen: int, micro: int) -> BlockKind:
    groups = expert_groups({layer.name: layer for layer in layers})
    routed = {name: len(group) for group in groups.values() for name in group} if chosen else {}
    counts: dict[LayerShape, tuple[int, float]] = {}
    channels = 0.0
    for layer in layers:
        share = min(1.0, chosen / routed[layer.name]) if layer.name in routed else 1.0
        spec = layer.scheme.weight if layer.is_quantized else None
        info = layer.info
        shape = LayerShape(info.out_features, info.in_features, spec, max(1, round(micro * share)))
        counts[shape] = (counts.get(shape, (0, share))[0] + 1, share)
        channels += share * info.out_features
    quantized = [layer for layer in layers if layer.is_quantized]
    return BlockKind(
        names=names,
        layers=counts,
        nbytes=nbytes,
        quantized=sum(layer.info.numel for layer in quantized),
        stored=sum(map(_stored, quantized)),
        largest=max((layer.info.numel for layer in quantized), default=0),
        channels=round(channels),
        widest=max((max(one.info.out_features, one.info.in_features) for one in layers), default=0),
        experts=Experts(max(routed.values()), chosen) if routed else None,
    )


def _stored(layer: LayerPlan) -> int:
    """Bytes of a layer's packed codes and its scales (float16, and a byte of zero point) in the work folder."""
    if not layer.is_quantized:
        return 0
    size = layer.scheme.weight.group_size
    groups = layer.info.numel // size if isinstance(size, int) and size > 0 else layer.info.out_features
    return layer.info.numel * layer.scheme.bits // 8 + 3 * groups


def _value(config: Any, name: str) -> int | None:
    """A number of a configuration; None where it has none, or one of its own for each layer."""
    try:
        found = getattr(config, name, None)
    except Exception:  # Transformers' own for values that differ between layers, which is no AttributeError
        return None
    return found if isinstance(found, int) else None


def _glue(config: Any, blocks: tuple[BlockKind, ...], length: int) -> Glue:
    hidden = _value(config, "hidden_size") or _value(config, "d_model")
    if not isinstance(hidden, int):
        hidden = min((shape.in_features for kind in blocks for shape in kind.layers), default=64)
    heads = _value(config, "num_attention_heads") or 0
    size = _value(config, "head_dim") or (hidden // heads if heads else 0)
    return Glue(hidden, max((kind.channels for kind in blocks), default=hidden), heads, size, length)
