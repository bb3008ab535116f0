"""Weights as they would be with each option: rounded to nearest, as a run without tuning does it.

What enters the layers of a block is watched when the samples first come through it; scales are searched for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from auto_round.algorithms.base import oriented
from auto_round.compressors.chain import LayerInputs, inputs_of
from auto_round.compressors.experts import input_scales, shared_importance
from auto_round.compressors.weights import fused_maxima
from auto_round.data_type import data_type
from auto_round.data_type.base import WeightTask
from auto_round.plan import LayerPlan

Options = Mapping[str, Sequence[LayerPlan]]
"""Layer name → what it would be with each option."""


@dataclass(frozen=True)
class Known:
    """What rounding pays heed to in one block: mean squares of inputs; for each option what fused layers share."""

    importance: Mapping[str, torch.Tensor]
    largest: Sequence[Mapping[str, float]]


class Rounding:
    """Rounds the layers of a model, block by block. search: whether scales are searched."""

    def __init__(self, model: nn.Module, options: Options, search: bool):
        self.options = options
        self._model, self._search = model, search
        self._inputs: dict[str, LayerInputs] = {}
        self._names: dict[str | None, list[str]] = {}
        for name, plans in options.items():
            self._names.setdefault(plans[0].info.block, []).append(name)

    def modules(self, block: str | None) -> dict[str, nn.Module]:
        """The layers of a block; those outside all blocks for None."""
        return {name: self._model.get_submodule(name) for name in self._names.get(block, ())}

    @contextlib.contextmanager
    def watch(self, block: str, module: nn.Module) -> Iterator[None]:
        """Open while the original block runs: what enters its layers at its first call."""
        with inputs_of(self.modules(block)) as seen:
            yield
        self._inputs = {**seen, **self._inputs}

    def known(self, block: str | None, module: nn.Module) -> Known:
        """What was seen of a block whose weights are there."""
        plans = {name: self.options[name] for name in self._names.get(block, ())}
        columns = [dict(zip(plans, column, strict=True)) for column in zip(*plans.values(), strict=True)]
        importance = shared_importance(columns[0], self._inputs) if columns and self._search else {}
        return Known(importance, [fused_maxima(module, block or "", column) for column in columns])

    @torch.no_grad()
    def rounded(self, name: str, known: Known) -> Iterator[torch.Tensor | None]:
        """The layer's weight [out, in] with each option; None where it stays."""
        weight = self.weight(name)
        for plan, largest in zip(self.options[name], known.largest, strict=True):
            if not plan.is_quantized:
                yield None
                continue
            importance, most = known.importance.get(name), largest.get(name)
            task = WeightTask(weight, plan.scheme.weight, importance, self._search, fused_max=most)
            yield data_type(plan.scheme.data_type).quantize(task).dequantize()

    def outside(self) -> dict[str, list[torch.Tensor | None]]:
        """The same for all layers outside the blocks, which are there all the time."""
        known = self.known(None, self._model)
        return {name: list(self.rounded(name, known)) for name in self.modules(None)}

    def weight(self, name: str) -> torch.Tensor:
        """[out, in], as it is in the model now."""
        return oriented(self._model.get_submodule(name).weight.detach(), self.options[name][0])

    def scales(self, layers: Mapping[str, LayerPlan]) -> dict[str, torch.Tensor]:
        """Fixed scales of what enters layers, for those that have one."""
        return input_scales(layers, self._inputs)
