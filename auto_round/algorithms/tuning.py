"""Tuning a block against the original's output: the loop that all gradient algorithms share.

The block runs with its weights replaced by their fake-quantized versions (`torch.func.functional_call`, so it does not
matter whether a layer is called or its weight is read), and the squared error of its output drives what a layer's
number family lets move. How it moves is the algorithm's `Rule`. Starting points and the choice among iterates are
compared on the same samples; the start, which is optimized round-to-nearest, is one of the candidates, so tuning never
makes a block worse than that.

Beside the weights, memory holds per weight: the rounded one and its gradient in the weight's dtype, what is tuned in
float32, the rule's state, and the codes of the best iterate. Gradients of what is tuned exist for one layer at a time.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator
from typing import Protocol

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from auto_round.algorithms.base import BlockTask, oriented
from auto_round.data_type import data_type
from auto_round.data_type.base import QuantizedTensor, Tunable
from auto_round.ranks import Ranks
from auto_round.store import BlockResult, TuningWork

JUDGE_SAMPLES = 32  # samples on which candidates are compared
LOSS_EVERY = 10  # iterations between recorded losses
PIECE = 1 << 18  # elements that a rule moves at once on a CPU


class Rule(Protocol):
    """How an algorithm moves a parameter along its gradient; it keeps its state between steps."""

    def move(self, parameter: torch.Tensor, kind: str, decay: float) -> None:
        """Move a leaf in place by its `grad`. kind: "value" or "clip"; decay: 1 at the first step, falling to 0."""


def tune_block(task: BlockTask, rule: Rule) -> BlockResult:
    """Tune every layer of the block together and return its codes.

    Raises:
        ValueError: the block's output is not finite before anything is tuned.
    """
    tuner = _Tuner(task, rule)
    settings = task.settings
    start = tuner.judge()
    if not math.isfinite(start):
        raise ValueError(
            f"{task.name}: the block's output is not finite on calibration samples: its activations overflow in this "
            "dtype; try another model_dtype, or amp=False (--disable_amp)"
        )
    losses, best_loss, best, note = [(0, start)], start, None, ""
    checkpoints = _checkpoints(settings.iters) if not settings.not_use_best_mse else {settings.iters}
    lowest, lowest_step = float("inf"), 0
    for step, indices in zip(range(1, settings.iters + 1), tuner.batches(), strict=False):
        loss = tuner.step(indices, 1.0 - (step - 1) / settings.iters)
        task.on_step(step, loss)
        if step % LOSS_EVERY == 0:
            losses.append((step, loss))
        if not math.isfinite(loss):
            note = f"the loss was not finite at iteration {step}, where tuning stopped"
            break
        if loss < lowest:
            lowest, lowest_step = loss, step
        settled = 0 < settings.dynamic_max_gap <= step - lowest_step
        if step in checkpoints or settled:
            judged = tuner.judge()
            if judged < best_loss:
                best_loss, best = judged, tuner.finish()
        if settled:
            break
    if best is None:
        note = f"{note}; " if note else ""
        note += "tuning did not improve on optimized round-to-nearest, which is kept"
        tuner.restart()
        best = tuner.finish()
    return BlockResult(best, losses, start, best_loss, note, work=tuner.work)


def _checkpoints(iters: int) -> set[int]:
    """Iterations whose state is a candidate: the learning rate falls to zero, so the last ones are the best."""
    return {iters, max(1, iters * 9 // 10)}


class _Tuner:
    """The parameters under tuning of one block, and the block's loss."""

    def __init__(self, task: BlockTask, rule: Rule):
        self.task, self.rule, self.io = task, rule, task.io
        task.module.requires_grad_(False)
        self.tunables: dict[str, Tunable] = {
            name: data_type(task.spec(name).data_type).tunable(task.of(name)) for name in task.layers
        }
        self.work = TuningWork()
        count = int(task.ranks.sum(len(self.io.lengths))[0])
        size = task.ranks.step_size(task.settings.samples_per_step, count)
        self.own, self.rounds = size // task.ranks.world, count // size
        judged = set(random.Random(0).sample(range(self.rounds), min(max(1, JUDGE_SAMPLES // size), self.rounds)))
        self.judges = [index for index in range(len(self.io.lengths)) if index // self.own in judged]

    def batches(self) -> Iterator[list[int]]:
        """See `batches`."""
        return batches(len(self.io.lengths), self.own, self.rounds, self.task.ranks, self.task.seed)

    def step(self, indices: list[int], decay: float) -> float:
        """One step; returns the batch's loss before it."""
        counter = FlopCounterMode(display=False) if not self.work.steps else None
        began = time.monotonic()
        leaves = {name: weight.requires_grad_() for name, weight in self._rounded().items()}
        if counter is None:
            loss = self._loss(indices, leaves, backward=True)
        else:
            with counter:
                loss = self._loss(indices, leaves, backward=True)
            self.work.flops = counter.get_total_flops()
        gradients = {name: _take_gradient(leaf) for name, leaf in leaves.items()}
        del leaves
        self.task.ranks.sum_(*gradients.values())
        for name in list(gradients):
            self._move(name, gradients.pop(name), decay)
        if counter is None:  # the first step is slower for being counted
            self.work.seconds += time.monotonic() - began
        self.work.steps += 1
        return loss

    def _move(self, name: str, gradient: torch.Tensor, decay: float) -> None:
        """Carry a weight's gradient back to what rounds it, and move that."""
        if name in self.task.sparse:
            return
        tunable = self.tunables[name]
        tunable.fake_quantize(gradient.dtype).backward(gradient)
        with torch.no_grad():
            for kind, parameter in tunable.parameters.items():
                self.rule.move(parameter, kind, decay)
                parameter.grad = None

    @torch.no_grad()
    def _rounded(self) -> dict[str, torch.Tensor]:
        """The weights as they would be stored now."""
        return {name: t.fake_quantize(self.task.weight(name).dtype) for name, t in self.tunables.items()}

    def _loss(self, indices: list[int], weights: dict[str, torch.Tensor], backward: bool) -> float:
        """Mean squared error of the block's output over the tokens of the batch, micro-batch by micro-batch."""
        replaced = {self.task.weight_name(n): oriented(w, self.task.layers[n]) for n, w in weights.items()}
        total, tokens = 0.0, 0
        (count,) = self.task.ranks.sum(sum(self.io.lengths[index] for index in indices))
        for part in self.io.split(indices, self.io.micro):
            args, kwargs = self.io.arguments(part)
            with self.task.amp():
                output = self.io.output(functional_call(self.task.module, replaced, args, kwargs))
            difference = output.float() - self.io.target(part).float()
            mask = self.io.mask(part, difference)
            if mask is not None:
                difference = difference * mask
            error = difference.square().mean(-1).sum()
            if backward and error.requires_grad:
                (error / count).backward()
            total += error.item()
            tokens += int(mask.sum()) if mask is not None else difference[..., 0].numel()
        total, tokens = self.task.ranks.sum(total, tokens)
        return total / max(tokens, 1)

    @torch.no_grad()
    def judge(self) -> float:
        """Loss of the present state on a fixed set of samples, comparable between iterations."""
        return self._loss(self.judges, self._rounded(), backward=False)

    @torch.no_grad()
    def restart(self) -> None:
        """Back to the starting point."""
        for tunable in self.tunables.values():
            tunable.reset()

    def finish(self) -> dict[str, QuantizedTensor]:
        return {name: tunable.finish() for name, tunable in self.tunables.items()}


def batches(count: int, own: int, rounds: int, ranks: Ranks, seed: int) -> Iterator[list[int]]:
    """Endless batches of `own` of a rank's `count` samples: shuffled passes, a sample of each stratum a step.

    Other ranks have the other strata. Sample i is of stratum i modulo the samples of a step, so that what a step takes
    does not depend on how many ranks share it. rounds: steps in a pass.
    """
    for turn in itertools.count():
        strata = []
        for place in range(own):
            stratum = list(range(place, count, own))
            random.Random(f"{seed}:{turn}:{ranks.rank * own + place}").shuffle(stratum)
            strata.append(stratum[:rounds])
        yield from map(list, zip(*strata, strict=True))


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Matching parts of contiguous tensors, so small that what is computed of them stays in a CPU's cache."""
    whole = tensors[0].numel() if tensors[0].device.type != "cpu" else PIECE
    return zip(*(tensor.view(-1).split(whole) for tensor in tensors), strict=True)


def _take_gradient(leaf: torch.Tensor) -> torch.Tensor:
    """A leaf's gradient; zero for a layer that the batch never reached (an expert without tokens)."""
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    leaf.grad = None
    return gradient
