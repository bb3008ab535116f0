"""End-to-end training of scales: the whole quantized model learns the original's distribution, its codes staying.

After the blocks are tuned one by one, the scales of all layers are trained together by Adam on the Kullback-Leibler
divergence of the model's output from the original's (compare EfficientQAT's second phase, arXiv 2407.11062, which
trains on the text itself). A step reads each block twice, and holds one block and the hidden states of its samples.
What was learned lies in one file beside the blocks; a stopped run goes on from the last steps that were kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from auto_round.algorithms.adamround import Adam
from auto_round.algorithms.base import oriented, put_weights, relative_name
from auto_round.algorithms.tuning import batches
from auto_round.calibration.forwards import Amp, Batch, PausedForward
from auto_round.calibration.native import NativeRun, logits_of
from auto_round.calibration.passes import Passes, joined
from auto_round.compressors.backoff import naming_the_lack
from auto_round.data_type import data_type
from auto_round.data_type.base import QuantizedTensor
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import OUTSIDE, LayerPlan, ModelPlan
from auto_round.progress import RunProgress
from auto_round.ranks import Ranks
from auto_round.settings import TuneSettings
from auto_round.store import LEARNED, Store
from auto_round.wrapper import quantized_inputs

if TYPE_CHECKING:
    from auto_round.compressors.base import Compressor

KEEP_EVERY = 10  # steps after which what was learned is written
KEPT = "scales-state"  # names the file of what was learned so far

Layers = Mapping[str, LayerPlan]


def obstacle(streamed: StreamedModel, plan: ModelPlan) -> str | None:
    """Why the scales of this model cannot be trained end to end; None if they can."""
    if not streamed.is_streamed:
        return "the original's weights are gone once a loaded model is quantized: give the model's folder instead"
    if plan.quantized(OUTSIDE):
        return f"{next(iter(plan.quantized(OUTSIDE)))}, which lies outside the blocks, is quantized"
    if not any(can_rescale(layer) for block in plan.block_names for layer in plan.quantized(block).values()):
        return "no layer is of a number format whose scales can be trained (integers)"
    return None


def can_rescale(layer: LayerPlan) -> bool:
    return hasattr(data_type(layer.scheme.weight.data_type), "rescaled")


def train_scales(run: Compressor) -> None:
    """Train the scales of a run's blocks, all of which are in its store; says so where it cannot be done.

    Raises:
        DoesNotFitError: memory is refused.
    """
    reason, tune = obstacle(run.streamed, run.plan), run.tune
    if reason is not None:
        run.note(f"scale_iters={tune.scale_iters} is left out: {reason}")
        return
    began, size = time.monotonic(), run.ranks.step_size(tune.samples_per_step, len(run.samples))
    training = Distillation(
        run.streamed, run.plan, run.store, run.native, run.own_samples(), size, tune, run.amp, run.ranks
    )
    with naming_the_lack("training scales"), RunProgress(1, tune.scale_iters, run.show_progress) as progress:
        run.scale_log = training.run(functools.partial(progress.step, 0, "scales of the whole model"))
        progress.block(0, "scales", f"trained, KL {run.scale_log[0][1]:.4g} -> {run.scale_log[-1][1]:.4g}")
    run.times["scales"] = time.monotonic() - began


@dataclass
class Learning:
    """What the training has come to. factors: layer name → what its scales are multiplied by, one for each."""

    factors: dict[str, torch.Tensor]
    rule: Adam
    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)


class Distillation:
    """Trains the scales of a store's blocks.

    samples: those of this rank. size: samples of a step over all ranks.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        plan: ModelPlan,
        store: Store,
        native: NativeRun,
        samples: Sequence[Batch],
        size: int,
        tune: TuneSettings,
        amp: Amp,
        ranks: Ranks,
    ):
        self._streamed, self._plan, self._store, self._amp, self._ranks = streamed, plan, store, amp, ranks
        self._samples, self._tune, self._size = samples, tune, size
        self._passes = Passes(streamed, amp, {place: joint.changes for place, joint in native.joints.items()})
        self._blocks = list(dict.fromkeys(block for block, _ in native.places if block in plan.block_names))
        self._gradients: dict[str, torch.Tensor] = {}
        self._teachers: list[PausedForward] = []

    def run(self, on_step: Callable[[int, float], None]) -> list[tuple[int, float]]:
        """Train, and leave the scales in the store; (step, divergence in nats per token before it) of each step."""
        key = self._store.digest(self._blocks)
        known = self._store.extra(LEARNED, key)
        if known is not None:
            return [(int(step), loss) for step, loss in known[1]["losses"]]
        learning = self._start(key)
        own, rounds = self._size // self._ranks.world, len(self._samples) * self._ranks.world // self._size
        order = batches(len(self._samples), own, rounds, self._ranks, self._tune.seed)
        for number, indices in zip(range(self._tune.scale_iters), order, strict=False):
            if number < learning.step:
                continue
            loss = self._step(learning, [self._samples[index] for index in indices])
            learning.losses.append((number, loss))
            on_step(number + 1, loss)
            if learning.step % KEEP_EVERY == 0:
                self._keep(learning, key)
        self._finish(learning, key)
        return learning.losses

    def _start(self, key: str) -> Learning:
        """From the beginning, or from where an earlier run was."""
        settings = dataclasses.replace(self._tune, minmax_lr=self._tune.scale_lr)
        learning = Learning({}, Adam(settings))
        for block in self._blocks:
            for name, tensor in self._tensors(block).items():
                learning.factors[name] = torch.ones_like(tensor.scale, dtype=torch.float32)
        kept = self._store.extra(KEPT, key)
        if kept is not None:
            tensors, facts = kept
            for name, factor in learning.factors.items():
                factor.copy_(tensors[f"{name}.factor"])
                moments = tensors[f"{name}.mean"], tensors[f"{name}.square"]
                learning.rule.restore(factor, moments, facts["step"])
            learning.step, learning.losses = facts["step"], [tuple(entry) for entry in facts["losses"]]
        return learning

    def _keep(self, learning: Learning, key: str) -> None:
        if not self._ranks.main:
            return
        tensors = {}
        for name, factor in learning.factors.items():
            mean, square = learning.rule.moments_of(factor)
            tensors |= {f"{name}.factor": factor, f"{name}.mean": mean, f"{name}.square": square}
        self._store.save_extra(KEPT, key, tensors, {"step": learning.step, "losses": learning.losses})

    def _finish(self, learning: Learning, key: str) -> None:
        if self._ranks.main:
            scales = {}
            for block in self._blocks:
                for name, tensor in self._tensors(block).items():
                    scales[name] = self._rescaled(tensor, learning.factors[name]).scale
            self._store.save_extra(LEARNED, key, scales, {"losses": learning.losses})
            self._store.drop_extra(KEPT)
        self._ranks.barrier()

    # ---- one step ------------------------------------------------------------------------------------------------

    def _step(self, learning: Learning, samples: Sequence[Batch]) -> float:
        """Move all scales once; the divergence before."""
        parts = joined(samples, self._streamed.model)
        self._gradients = {name: torch.zeros_like(factor) for name, factor in learning.factors.items()}
        self._teachers = [PausedForward(self._streamed.model, self._placed(part), self._amp) for part in parts]
        ahead, back = (functools.partial(watch, learning=learning) for watch in (self._ahead, self._back))
        try:
            total, tokens = self._passes.run(parts, ahead, back, self._divergence)
        finally:
            for teacher in self._teachers:
                teacher.close()
        total, tokens = self._ranks.sum(total, tokens)
        self._ranks.sum_(*self._gradients.values())
        decay = 1.0 - learning.step / self._tune.scale_iters
        for name, factor in learning.factors.items():
            factor.grad = self._gradients[name]
            learning.rule.move(factor, "clip", decay)
            factor.grad = None
        learning.step += 1
        return total / max(tokens, 1)

    def _placed(self, batch: Batch) -> Batch:
        return {key: value.to(self._streamed.device) for key, value in batch.items()}

    @contextlib.contextmanager
    def _ahead(self, block: str, module: nn.Module, learning: Learning) -> Iterator[None]:
        """The original goes on through the block; then its weights are the quantized ones."""
        for teacher in self._teachers:
            if teacher.call is None:
                teacher.start()
            with torch.no_grad(), self._amp():
                output = module(*teacher.call.args, **teacher.call.kwargs)
            teacher.resume(output)
        with self._quantized(block, module, learning):
            yield

    @contextlib.contextmanager
    def _quantized(self, block: str, module: nn.Module, learning: Learning) -> Iterator[dict[str, QuantizedTensor]]:
        """While open, the block computes as the quantized model does; gives the layers whose scales are trained."""
        layers = self._plan.quantized(block)
        tensors = self._store.load(block, layers, learned=False).tensors if layers else {}
        trained = {name: tensors[name] for name in layers if name in learning.factors}
        present = {name: self._rescaled(tensor, learning.factors[name]) for name, tensor in trained.items()}
        put_weights(module, block, {name: present.get(name) or tensors[name] for name in layers}, layers)
        scales = {n: tensors[n].input_scale for n, plan in layers.items() if plan.scheme.needs_input_range}
        with quantized_inputs(self._streamed.model, layers, scales):
            yield trained

    @contextlib.contextmanager
    def _back(self, block: str, module: nn.Module, learning: Learning) -> Iterator[None]:
        """The block computes as quantized, and what its weights' gradients say of the scales is added up."""
        with self._quantized(block, module, learning) as trained:
            weights = {name: module.get_parameter(f"{relative_name(name, block)}.weight") for name in trained}
            for weight in weights.values():
                weight.requires_grad_()
            yield
            for name, weight in weights.items():
                if weight.grad is not None:
                    gradient = oriented(weight.grad, self._plan.layers[name]).float()
                    self._gradients[name] += _of_scales(gradient, trained[name])
                weight.grad = None
                weight.requires_grad_(False)

    def _divergence(self, number: int, logits: torch.Tensor) -> torch.Tensor:
        """Of each token, in nats: KL(original ‖ quantized)."""
        teacher = self._teachers[number]
        want = logits_of(teacher.output).flatten(0, -2).float().log_softmax(-1)
        teacher.output = None
        return ((want - logits.log_softmax(-1)) * want.exp()).sum(-1)

    # ---- tensors -------------------------------------------------------------------------------------------------

    def _tensors(self, block: str) -> dict[str, QuantizedTensor]:
        """The layers of a block whose scales can be trained, as the block's tuning left them."""
        layers = {name: layer for name, layer in self._plan.quantized(block).items() if can_rescale(layer)}
        return dict(self._store.load(block, layers, learned=False).tensors) if layers else {}

    @staticmethod
    def _rescaled(tensor: QuantizedTensor, factor: torch.Tensor) -> QuantizedTensor:
        return data_type(tensor.spec.data_type).rescaled(tensor, factor)


@torch.no_grad()
def _of_scales(gradient: torch.Tensor, tensor: QuantizedTensor) -> torch.Tensor:
    """The gradient [out, in] of a weight as one of the factors of its scales, float32, shaped like `tensor.scale`.

    The weight is proportional to its factors, so the slope is the weight that each would have at 1.
    """
    moved = gradient * tensor.dequantize().to(gradient.device)
    if tensor.scale.numel() == 1:
        return moved.sum().view(tensor.scale.shape).cpu()
    return moved.view(*tensor.scale.shape, -1).sum(-1).cpu()
