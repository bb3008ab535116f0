"""How much worse the model gets when a layer is rounded, for each scheme it could have: an estimate of the divergence.

A change dW of a layer's weight moves its output by dW·x. To second order the Kullback-Leibler divergence per token
between the original's distribution and the changed one is ½ E[(gᵀ dW x)²], where g is the gradient of -log p(label) at
the layer's output and the label is drawn from the model's own distribution (Fisher's information). So one forward and
one backward serve all layers and schemes. How well it predicts: benchmarks/README.md.

The sum is over all tokens that a token's loss depends on: through attention, what rounding does to one token adds up
with what it does to others. As squares of whole samples' sums are few and so vary much, tokens are taken alone, and a
factor for all layers of one name says how much larger the squares of sums are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from auto_round.auto_scheme.rounding import Options, Rounding
from auto_round.calibration.forwards import Amp, Batch
from auto_round.calibration.native import NativeRun
from auto_round.calibration.passes import Loss, Passes, joined
from auto_round.compressors.experts import expert_groups
from auto_round.data_type import data_type
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import LayerPlan

ROWS = 1024  # tokens whose changed outputs are in memory at once

Traffic = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Inputs [samples, tokens, in] and gradients of outputs [samples, tokens, out] of one layer."""


@dataclass(frozen=True)
class Sensitivities:
    """What was measured.

    losses: layer name → for each option the divergence (nats per token) that it is expected to add.
    guessed: layers that the text did not reach: they got the average of their kind, by weight.
    """

    losses: dict[str, list[float]]
    tokens: int
    guessed: list[str] = field(default_factory=list)


def measure(
    streamed: StreamedModel,
    options: Options,
    samples: Sequence[Batch],
    native: NativeRun,
    amp: Amp,
    *,
    search: bool,
    seed: int,
) -> Sensitivities:
    """Expected loss of each layer with each option. search: whether scales are searched when weights are rounded.

    Raises:
        ReplayError: samples take different ways through the model.
        ValueError: gradients are not finite.
    """
    rounding = Rounding(streamed.model, options, search)
    meter = _Meter(rounding)
    changes = {place: joint.changes for place, joint in native.joints.items()}
    passes, loss = Passes(streamed, amp, changes), _own_labels(torch.Generator(streamed.device).manual_seed(seed))
    with meter.outside():
        _, tokens = passes.run(joined(samples, streamed.model), rounding.watch, meter.back, loss)
    factors = coherence({name: sums for name, sums in meter.sums.items() if options[name][0].info.block is not None})
    losses = {
        name: [factors.get(_role(name), 1.0) * alone / (2 * tokens) for alone in sums.alone]
        for name, sums in meter.sums.items()
    }
    bad = next((name for name, found in losses.items() if not all(map(_is_finite, found))), None)
    if bad is not None:
        raise ValueError(
            f"the gradients of {bad} are not finite, so AutoScheme cannot judge it: try model_dtype=bfloat16 or "
            "float32, or give each layer its scheme with layer_config"
        )
    return _completed(losses, options, tokens)


def _own_labels(generator: torch.Generator) -> Loss:
    """-log p(label), for labels drawn from the model's own distribution."""

    def loss(number: int, logits: torch.Tensor) -> torch.Tensor:
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        return functional.cross_entropy(logits, labels, reduction="none")

    return loss


@dataclass
class Sums:
    """Of one layer, for each option: squares of what it does to single tokens, and of its sums over samples."""

    alone: list[float]
    together: list[float]

    @classmethod
    def none(cls, options: int) -> Sums:
        return cls([0.0] * options, [0.0] * options)


def coherence(sums: Mapping[str, Sums]) -> dict[str, float]:
    """Last part of a layer's name → how much larger squares of sums are than sums of squares, on average."""
    found: dict[str, list[float]] = {}
    for name, one in sums.items():
        pairs = zip(one.alone, one.together, strict=True)
        found.setdefault(_role(name), []).extend(together / alone for alone, together in pairs if alone > 0)
    return {role: sum(ratios) / len(ratios) for role, ratios in found.items() if ratios}


def _role(name: str) -> str:
    return name.rpartition(".")[2]


def _is_finite(number: float) -> bool:
    return number == number and abs(number) != float("inf")


def _completed(losses: dict[str, list[float]], options: Options, tokens: int) -> Sensitivities:
    """With a guess for layers that were never called: the average of layers of their name, or of all, by weight."""
    guessed = [name for name in options if name not in losses]
    found = {name: losses[name] for name in options if name in losses}
    for name in guessed:
        alike = [other for other in found if _role(other) == _role(name)] or list(found)
        weights = sum(options[other][0].info.numel for other in alike)
        share = options[name][0].info.numel / max(weights, 1)
        losses[name] = [share * sum(column) for column in zip(*(losses[o] for o in alike), strict=True)]
    return Sensitivities({name: losses.get(name, []) for name in options}, tokens, guessed)


class _Meter:
    """Watches the layers of a model in both passes and adds up (gᵀ dW x)²: `sums` of each layer."""

    def __init__(self, rounding: Rounding):
        self._rounding, self._options = rounding, rounding.options
        self.sums: dict[str, Sums] = {}

    @contextlib.contextmanager
    def back(self, block: str, module: nn.Module) -> Iterator[None]:
        """Inputs and gradients, judged once all samples have come through."""
        modules, traffic = self._rounding.modules(block), {}
        with _observed(modules, lambda name, x, g: traffic.setdefault(name, []).append((x, g))):
            yield
        known = self._rounding.known(block, module)
        experts = {name for names in expert_groups(modules).values() for name in names}
        for name in modules:
            if name in traffic or name in experts:  # an expert that no token reaches adds nothing
                self._add(name, traffic.pop(name, ()), self._rounding.rounded(name, known))

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Layers outside the blocks, judged sample by sample: an output layer's gradients are as many as its logits."""
        modules, rounded = self._rounding.modules(None), self._rounding.outside()
        with _observed(modules, lambda name, x, g: self._add(name, [(x, g)], rounded[name])):
            yield

    @torch.no_grad()
    def _add(self, name: str, traffic: Traffic, rounded: Iterator[torch.Tensor | None] | Sequence) -> None:
        """Add what a layer's options change, given what went through it."""
        weight, sums = self._rounding.weight(name), self.sums.setdefault(name, Sums.none(len(self._options[name])))
        for index, (plan, changed) in enumerate(zip(self._options[name], rounded, strict=True)):
            if changed is None:
                continue
            difference = changed.to(weight.device) - weight.float()
            for inputs, gradients in _parts(traffic):
                moved = functional.linear(inputs, difference.to(inputs.dtype))
                if plan.scheme.act is not None:
                    moved = moved + self._moved_by_input(plan, inputs, changed)
                felt = (moved.float() * gradients.float()).sum(-1).double()
                sums.alone[index] += felt.square().sum().item()
                sums.together[index] += felt.sum(-1).square().sum().item()

    def _moved_by_input(self, plan: LayerPlan, x: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
        """What rounding a layer's input does to its output, with the rounded weight."""
        scales = self._rounding.scales({plan.name: plan})
        scale = scales[plan.name].to(x.device) if plan.name in scales else None
        rounded = data_type(plan.scheme.act.data_type).quantize_input(x, plan.scheme.act, scale)
        return functional.linear(rounded - x, changed.to(x.device, x.dtype))


def _parts(traffic: Traffic) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A few whole samples at a time."""
    for x, g in traffic:
        count = max(1, ROWS // x.shape[1])
        yield from zip(x.split(count), g.split(count), strict=True)


@contextlib.contextmanager
def _observed(modules: Mapping[str, nn.Module], collect) -> Iterator[None]:
    """While open, `collect(name, inputs, gradients)`, as in `Traffic`, of each backward through a layer.

    Of an expert it is not known whose tokens it gets: each counts as a sample.
    """

    def hook(name: str):
        def after(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if isinstance(output, torch.Tensor) and output.requires_grad and output.numel():
                x = _by_sample(args[0].detach())
                output.register_hook(lambda g: collect(name, x, _by_sample(g.detach())))

        return after

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_sample(tensor: torch.Tensor) -> torch.Tensor:
    """[…, channels] as [samples, tokens, channels]; rows without a sample are one each."""
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)
