"""Choices tried out: the divergence of models that are rounded to nearest, several side by side on the same samples.

Expected losses are sums over layers; what roundings of several layers do together is seen only by rounding them. All
choices and the original go through the model together, so that each block is loaded, and rounded, once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from auto_round.algorithms.base import oriented
from auto_round.auto_scheme.rounding import Options, Rounding
from auto_round.calibration.forwards import Amp, Batch, PausedForward, pausing
from auto_round.calibration.native import Place, logits_of, no_cache
from auto_round.calibration.passes import common_place, joined
from auto_round.modeling.streaming import StreamedModel
from auto_round.wrapper import quantized_inputs

Pick = Mapping[str, int]
"""Layer name → index of its option."""
Weights = Mapping[str, Sequence[torch.Tensor | None]]


def divergences(
    streamed: StreamedModel, options: Options, picks: Sequence[Pick], samples: Sequence[Batch], amp: Amp, search: bool
) -> list[float]:
    """Kullback-Leibler divergence from the original, in nats per token, of the model with each pick.

    Raises:
        ReplayError: samples take different ways through the model.
    """
    return _Trial(streamed, Rounding(streamed.model, options, search), picks, amp).run(joined(samples, streamed.model))


class _Trial:
    """The forwards of the original, and those with each pick, paused at the same block."""

    def __init__(self, streamed: StreamedModel, rounding: Rounding, picks: Sequence[Pick], amp: Amp):
        self._streamed, self._rounding, self._picks, self._amp = streamed, rounding, picks, amp
        self._outside = rounding.outside()

    def run(self, batches: Sequence[Batch]) -> list[float]:
        model, device = self._streamed.model, self._streamed.device
        batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
        totals, tokens = torch.zeros(len(self._picks), dtype=torch.float64), 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(pausing(model, self._streamed.blocks))
            stack.enter_context(no_cache(model))
            lines = [[PausedForward(model, batch, self._amp) for batch in batches] for _ in (None, *self._picks)]
            for forward in (forward for line in lines for forward in line):
                stack.callback(forward.close)
                forward.start()
            while (place := common_place([forward for line in lines for forward in line])) is not None:
                outputs = self._through(place, lines)
                for index, batch in enumerate(batches):
                    found = self._resume([line[index] for line in lines], [output[index] for output in outputs], batch)
                    totals, tokens = totals + torch.tensor(found[0], dtype=torch.float64), tokens + found[1]
        return (totals / tokens).tolist()

    @torch.no_grad()
    def _resume(self, forwards: list[PausedForward], outputs: list[Any], batch: Batch) -> tuple[list[float], int]:
        """Take a batch on to the next block; at its end, how far each line's distribution is from the original's.

        Logits of the original and of one line are in memory.

        Returns:
            (sums over tokens, number of tokens); zeros before the end.
        """
        totals, want, counts = [0.0] * len(self._picks), None, None
        for number, (forward, output, pick) in enumerate(zip(forwards, outputs, (None, *self._picks), strict=True)):
            with self._placed(None, pick, self._outside):
                forward.resume(output)
            if forward.call is not None:
                continue
            got = logits_of(forward.output).flatten(0, -2).float().log_softmax(-1)
            forward.output = None
            if want is None:
                want, counts = got, _counts(batch, got)
            else:
                totals[number - 1] = (((want - got) * want.exp()).sum(-1) * counts).double().sum().item()
        return totals, 0 if counts is None else int(counts.sum())

    @torch.no_grad()
    def _through(self, place: Place, lines: list[list[PausedForward]]) -> list[list[Any]]:
        """What a block makes of all forwards, with the weights that belong to each line."""
        block = place[0]
        with self._streamed.loaded(block) as module:
            with self._rounding.watch(block, module):
                outputs = [[self._run(module, forward) for forward in lines[0]]]
            known = self._rounding.known(block, module)
            dtype = {name: layer.weight.dtype for name, layer in self._rounding.modules(block).items()}
            weights = {
                name: [None if one is None else one.to(dtype[name]) for one in self._rounding.rounded(name, known)]
                for name in dtype
            }
            for line, pick in zip(lines[1:], self._picks, strict=True):
                with self._placed(block, pick, weights):
                    outputs.append([self._run(module, forward) for forward in line])
        return outputs

    def _run(self, module: torch.nn.Module, forward: PausedForward) -> Any:
        with self._amp():
            return module(*forward.call.args, **forward.call.kwargs)

    @contextlib.contextmanager
    def _placed(self, block: str | None, pick: Pick | None, weights: Weights) -> Iterator[None]:
        """While open, layers have the weights that they would have, and round their inputs."""
        if pick is None or not weights:
            yield
            return
        plans = {name: self._rounding.options[name][pick[name]] for name in weights}
        modules = self._rounding.modules(block)
        kept = {}
        for name, plan in plans.items():
            if plan.is_quantized:
                kept[name] = modules[name].weight.data
                modules[name].weight.data = oriented(weights[name][pick[name]].to(kept[name].dtype), plan)
        try:
            with quantized_inputs(self._streamed.model, plans, self._rounding.scales(plans)):
                yield
        finally:
            for name, weight in kept.items():
                modules[name].weight.data = weight


def _counts(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """1 for each row of logits that stands for a token, 0 for padding."""
    mask = batch.get("attention_mask")
    return mask.flatten() if mask is not None and mask.numel() == len(logits) else torch.ones_like(logits[:, 0])
