"""SignRound (arXiv 2309.05516): rounding offsets and clipping ranges tuned by signed gradient descent, block by block.

The block runs with its weights replaced by their fake-quantized versions (`torch.func.functional_call`, so it does not
matter whether a layer is called or its weight is read), and the squared error of its output against the original's
drives the offsets. Starting points and the choice among iterates are compared on the same samples; the start, which is
optimized round-to-nearest, is one of the candidates, so tuning never makes a block worse than that.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch.func import functional_call

from auto_round.algorithms.base import BlockTask, oriented
from auto_round.calibration.block_io import micro_batch
from auto_round.data_type import data_type
from auto_round.store import BlockResult

JUDGE_SAMPLES = 32  # samples on which candidates are compared
LOSS_EVERY = 10  # iterations between recorded losses


def quantize_block(task: BlockTask) -> BlockResult:
    """Tune every layer of the block together and return its codes."""
    tuner = _Tuner(task)
    start = tuner.judge()
    losses = [(0, start)]
    best_loss, best = start, None
    settings = task.settings
    checkpoints = _checkpoints(settings.iters) if not settings.not_use_best_mse else {settings.iters}
    lowest, lowest_step = float("inf"), 0
    for step, indices in zip(range(1, settings.iters + 1), tuner.batches(), strict=False):
        loss = tuner.step(indices, 1.0 - (step - 1) / settings.iters)
        task.on_step(step, loss)
        if step % LOSS_EVERY == 0:
            losses.append((step, loss))
        if loss < lowest:
            lowest, lowest_step = loss, step
        settled = 0 < settings.dynamic_max_gap <= step - lowest_step
        if step in checkpoints or settled:
            judged = tuner.judge()
            if judged < best_loss:
                best_loss, best = judged, tuner.snapshot()
        if settled:
            break
    if best is None:
        tuner.restart()
        note = "tuning did not improve on optimized round-to-nearest, which is kept"
    else:
        tuner.restore(best)
        note = ""
    return BlockResult(tuner.finish(), losses, start, best_loss, note)


def _checkpoints(iters: int) -> set[int]:
    """Iterations whose state is a candidate: the learning rate falls to zero, so the last ones are the best."""
    return {iters, max(1, iters * 9 // 10)}


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    """A leaf's gradient; zero for a layer that the batch never reached (an expert without tokens)."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


class _Tuner:
    """The parameters under tuning of one block, and the block's loss."""

    def __init__(self, task: BlockTask):
        self.task = task
        self.io = task.io
        self.random = random.Random(task.seed)
        self.micro = micro_batch(self.io.lengths, self.io.device, task.settings.batch_size)
        task.module.requires_grad_(False)
        self.tunables = {name: data_type(task.spec(name).data_type).tunable(task.of(name)) for name in task.layers}
        self.momentum: dict[int, torch.Tensor] = {}
        count = len(self.io.lengths)
        self.judges = random.Random(0).sample(range(count), min(JUDGE_SAMPLES, count))

    def batches(self) -> Iterator[list[int]]:
        """Endless batches: shuffled passes over the samples, the remainder of a pass dropped."""
        count = len(self.io.lengths)
        size = min(self.task.settings.samples_per_step, count)
        while True:
            order = self.random.sample(range(count), count)
            for begin in range(0, count - size + 1, size):
                yield order[begin : begin + size]

    def step(self, indices: list[int], decay: float) -> float:
        """One signed gradient step; returns the batch's loss before it."""
        dtype = {name: self.task.weight(name).dtype for name in self.tunables}
        quantized = {name: t.fake_quantize(dtype[name]) for name, t in self.tunables.items()}
        leaves = {name: weight.detach().requires_grad_() for name, weight in quantized.items()}
        loss = self._loss(indices, leaves, backward=True)
        torch.autograd.backward(list(quantized.values()), [_gradient(leaf) for leaf in leaves.values()])
        self._descend(decay)
        return loss

    def _loss(self, indices: list[int], weights: dict[str, torch.Tensor], backward: bool) -> float:
        """Mean squared error of the block's output over the tokens of the batch, micro-batch by micro-batch."""
        replaced = {self.task.weight_name(n): oriented(w, self.task.layers[n]) for n, w in weights.items()}
        total, tokens = 0.0, 0
        count = sum(self.io.lengths[index] for index in indices)
        for part in self.io.split(indices, self.micro):
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
        return total / max(tokens, 1)

    @torch.no_grad()
    def _descend(self, decay: float) -> None:
        settings = self.task.settings
        rates = {"value": settings.rounding_lr * decay, "clip": settings.clip_lr * decay}
        for name, tunable in self.tunables.items():
            if name in self.task.sparse:
                continue
            for kind, parameter in tunable.parameters.items():
                gradient = parameter.grad
                if settings.momentum:
                    kept = self.momentum.setdefault(id(parameter), torch.zeros_like(parameter))
                    gradient = kept.mul_(settings.momentum).add_(gradient)
                parameter.sub_(gradient.sign(), alpha=rates[kind])
                parameter.grad = None

    @torch.no_grad()
    def judge(self) -> float:
        """Loss of the present state on a fixed set of samples, comparable between iterations."""
        weights = {name: t.fake_quantize(self.task.weight(name).dtype) for name, t in self.tunables.items()}
        return self._loss(self.judges, weights, backward=False)

    def snapshot(self) -> list[torch.Tensor]:
        return [p.detach().clone() for t in self.tunables.values() for p in t.parameters.values()]

    @torch.no_grad()
    def restore(self, state: list[torch.Tensor]) -> None:
        for parameter, kept in zip(self._parameters(), state, strict=True):
            parameter.copy_(kept)

    @torch.no_grad()
    def restart(self) -> None:
        """Back to the starting point."""
        for tunable in self.tunables.values():
            tunable.reset()

    def _parameters(self) -> list[torch.Tensor]:
        return [p for t in self.tunables.values() for p in t.parameters.values()]

    def finish(self):
        return {name: tunable.finish() for name, tunable in self.tunables.items()}
