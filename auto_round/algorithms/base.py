"""What an algorithm is given and what it returns: a block with its inputs and plan → quantized tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from auto_round.calibration.block_io import BlockIO
from auto_round.data_type.base import QuantizedTensor, WeightTask
from auto_round.plan import LayerPlan
from auto_round.ranks import Ranks
from auto_round.schemes import TensorSpec
from auto_round.settings import TuneSettings


@dataclass
class BlockTask:
    """One block to quantize.

    layers: full layer name → plan; io: its calibration activations, None where the algorithm needs none;
    importance: layer name → mean square of each input channel [in]; fused_max: layer name → largest magnitude over
    the layers that engines fuse with it; sparse: layers that too few tokens reach to tune
    their rounding; amp: autocast context of its forward;
    on_step: called as (iteration, loss) to show progress; ranks: those that work on this block together, each with its
    share of the samples in `io`.
    """

    name: str
    module: nn.Module
    layers: Mapping[str, LayerPlan]
    settings: TuneSettings
    seed: int
    io: BlockIO | None = None
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fused_max: Mapping[str, float] = field(default_factory=dict)
    sparse: frozenset[str] = frozenset()
    amp: Callable[[], AbstractContextManager] | None = None
    on_step: Callable[[int, float], None] = lambda step, loss: None
    ranks: Ranks = field(default_factory=Ranks)

    def weight_name(self, layer: str) -> str:
        """The layer's weight as the block knows it."""
        return f"{relative_name(layer, self.name)}.weight"

    def weight(self, layer: str) -> torch.Tensor:
        """[out, in], whatever the orientation in which the module stores it."""
        return oriented(self.module.get_parameter(self.weight_name(layer)), self.layers[layer])

    def spec(self, layer: str) -> TensorSpec:
        return self.layers[layer].scheme.weight

    def of(self, layer: str) -> WeightTask:
        """A layer's weight as its number family takes it."""
        return WeightTask(
            self.weight(layer),
            self.spec(layer),
            self.importance.get(layer),
            self.settings.search,
            self.settings.enable_minmax_tuning,
            self.fused_max.get(layer),
        )


def relative_name(layer: str, block: str) -> str:
    """A layer's name within a block (the whole model has the empty name)."""
    return layer[len(block) + 1 :] if block else layer


def oriented(weight: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """Between the module's orientation and [out, in]; its own inverse."""
    return weight.t() if plan.info.transposed else weight


@torch.no_grad()
def put_weights(
    module: nn.Module, block: str, tensors: Mapping[str, QuantizedTensor], layers: Mapping[str, LayerPlan]
) -> None:
    """Write the dequantized weights into a block, in the dtype it computes in."""
    for name, tensor in tensors.items():
        parameter = module.get_parameter(f"{relative_name(name, block)}.weight")
        value = tensor.dequantize().to(parameter.dtype)
        parameter.copy_(oriented(value, layers[name]))
