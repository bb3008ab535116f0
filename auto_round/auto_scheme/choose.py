"""From what is asked for to a scheme for each layer: candidates, what they cost and lose, and the best choice.

Expected losses are off by some factor, and add up only nearly: so a few choices are tried out, the best by expected
losses among them. What was measured is kept in the work folder, so that a run that goes on later makes the same choice
without measuring again, and one with another budget measures only that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from auto_round.auto_scheme import NSAMPLES, SEQLEN, AutoScheme
from auto_round.auto_scheme.budget import bits_of, bytes_of, reachable, shared_groups
from auto_round.auto_scheme.rounding import Options
from auto_round.auto_scheme.sensitivity import Sensitivities, measure
from auto_round.auto_scheme.solve import solve
from auto_round.auto_scheme.trial import divergences
from auto_round.calibration.feed import complete_sample
from auto_round.calibration.forwards import ReplayError
from auto_round.compressors.adapt import Recipe
from auto_round.compressors.backoff import naming_the_lack
from auto_round.formats.base import ExportFormat
from auto_round.formats.export import planned_bytes
from auto_round.formats.writer import write_json
from auto_round.logger import logger
from auto_round.modeling.reading import CheckpointError, read_json
from auto_round.plan import ModelPlan, PlanError, fit_scheme, match_layers
from auto_round.report import size
from auto_round.schemes import QuantizationScheme
from auto_round.store import fingerprint
from auto_round.utils.device import is_out_of_memory
from auto_round.utils.files import make_folder

if TYPE_CHECKING:
    from auto_round.compressors.base import Compressor

TRIALS = 8  # choices that are tried out
SPREAD = 0.4  # by which expected losses may be off, as the deviation of their logarithm (see benchmarks/README.md)

Samples = list[dict[str, torch.Tensor]]
Facts = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """A scheme for each layer that was chosen for.

    recipe: layer name → (scheme, reason, explicit), as a plan takes it. common: the scheme of the most weights.
    average_bits: with scales and zero points unless these are not to count. predicted: divergence (nats per token) that
    the layers' losses add up to where weights are rounded to nearest; tried: what it is then on the same text, the
    least of so many `trials`; tuning lowers both. averages: of each option alone.
    """

    auto: AutoScheme
    recipe: Recipe
    common: QuantizationScheme
    average_bits: float
    predicted: float
    tried: float
    trials: int
    averages: Mapping[str, float]
    groups: int
    tokens: int
    seconds: float
    notes: Sequence[str] = ()

    def describe(self) -> dict[str, Any]:
        """Plain values for the report."""
        return {
            "asked": str(self.auto),
            "average_bits": round(self.average_bits, 4),
            "predicted_kl": self.predicted,
            "tried_kl": self.tried,
            "trials": self.trials,
            "average_bits_of_options": {name: round(value, 4) for name, value in self.averages.items()},
            "layers": len(self.recipe),
            "groups": self.groups,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True)
class _Table:
    """Groups of layers that choose together, what each would take with each option (in bits, or bytes), and the limit.

    total: weights.
    """

    groups: list[list[str]]
    costs: list[list[int]]
    budget: int
    total: int


def choose_schemes(run: Compressor, fmt: ExportFormat, root: Path | None = None) -> Choice:
    """The best scheme for each layer within the run's budget.

    Args:
        fmt: what the result is stored in; bytes are counted in it. root: the folder that measured losses are kept in.

    Raises:
        PlanError: nothing to choose for, or the budget is out of what the options reach.
        ReplayError, ValueError, DoesNotFitError: losses cannot be measured; the messages say why.
    """
    began, auto = time.monotonic(), run.auto
    options = _options(run.plan, auto)
    table = _table(run, options, fmt)
    found = _together(run, options, table, root)
    plans = {name: options[name][index] for name, index in found.pick.items()}
    weights = Counter()
    for plan in plans.values():
        weights[plan.scheme] += plan.info.numel if plan.is_quantized else 0
    notes = [_unmeasured(found.guessed)] if found.guessed else []
    choice = Choice(
        auto,
        {name: (plan.scheme, plan.reason, True) for name, plan in plans.items()},
        max(weights, key=weights.__getitem__),
        sum(bits_of(plan, auto.ignore_scale_zp_bits) for plan in plans.values()) / table.total,
        found.expected,
        found.tried,
        found.trials,
        _averages(options, auto),
        len(table.groups),
        found.tokens,
        time.monotonic() - began,
        notes,
    )
    logger.info("AutoScheme: %.3f bits on average, expected KL %.4g", choice.average_bits, choice.predicted)
    return choice


def _unmeasured(names: Sequence[str]) -> str:
    return (
        f"AutoScheme could not measure {len(names)} layers ({names[0]} …), which the text does not reach: they count "
        "as the average layer of their kind"
    )


def _options(plan: ModelPlan, auto: AutoScheme) -> Options:
    """What each layer could become: those that the plan quantizes, unless a rule says how.

    Raises:
        PlanError: there are none, or a scheme that cannot be.
    """
    ruled = {name for rule in plan.rules for name in match_layers(rule, list(plan.layers))}
    found = {
        name: [fit_scheme(layer.info, scheme, f"AutoScheme: {label}") for label, scheme in auto.schemes.items()]
        for name, layer in plan.quantized().items()
        if name not in ruled
    }
    if not found:
        raise PlanError("AutoScheme has no layer to choose a scheme for: rules decide about all of them")
    return found


def _averages(options: Options, auto: AutoScheme) -> dict[str, float]:
    """Bits per weight where all layers have one option."""
    total = sum(plans[0].info.numel for plans in options.values())
    columns = zip(*options.values(), strict=True)
    return {
        name: sum(bits_of(plan, auto.ignore_scale_zp_bits) for plan in column) / total
        for name, column in zip(auto.schemes, columns, strict=True)
    }


def _table(run: Compressor, options: Options, fmt: ExportFormat) -> _Table:
    """What choices cost, and what they may cost.

    Raises:
        PlanError: no choice meets the budget.
    """
    auto, total = run.auto, sum(plans[0].info.numel for plans in options.values())
    groups = shared_groups(list(options), auto, run.target)
    if auto.avg_bits is not None:
        each = {name: [bits_of(plan, auto.ignore_scale_zp_bits) for plan in plans] for name, plans in options.items()}
        budget = int(auto.avg_bits * total + 1e-6)
    else:
        each = {name: [bytes_of(plan, fmt) for plan in plans] for name, plans in options.items()}
        budget = auto.target_bytes - _other_bytes(run, options, fmt)
    costs = [[sum(column) for column in zip(*(each[name] for name in group), strict=True)] for group in groups]
    low, high = sum(map(min, costs)), sum(map(max, costs))
    if auto.avg_bits is not None and not low <= budget <= high:
        raise PlanError(
            f"an average of {auto.avg_bits:g} bits cannot be reached with these options, which go from "
            f"{low / total:.2f} to {high / total:.2f} bits: {reachable(_averages(options, auto))} (scales and zero "
            "points included, unless ignore_scale_zp_bits)"
        )
    if budget < low:
        least = low + auto.target_bytes - budget
        raise PlanError(
            f"{fmt.name} of {auto.target_size} cannot be reached: the smallest options take {size(least)}, of which "
            f"{size(least - low)} are not chosen for; give a larger size, or smaller options"
        )
    return _Table(groups, costs, budget, total)


def _other_bytes(run: Compressor, options: Options, fmt: ExportFormat) -> int:
    """Bytes of everything that the choice does not change."""
    return planned_bytes(run.streamed, run.plan, fmt) - sum(bytes_of(run.plan.layers[name], fmt) for name in options)


# ---- what is measured, once --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """The best choice. pick: layer name → index of its option; expected: the sum of its losses."""

    pick: dict[str, int]
    expected: float
    tried: float
    trials: int
    tokens: int
    guessed: list[str]


def _together(run: Compressor, options: Options, table: _Table, root: Path | None) -> _Found:
    """Found by the main rank; the others are told."""
    samples = _samples(run, root)  # all ranks take part where the model writes its own text
    found = _find(run, options, table, samples, root) if run.ranks.main else None
    run.ranks.barrier()
    told = run.ranks.everyone(json.dumps(dataclasses.asdict(found)).encode() if found is not None else b"")
    return _Found(**json.loads(told[0]))


def _find(run: Compressor, options: Options, table: _Table, samples: Samples, root: Path | None) -> _Found:
    """The best of a few choices that are best by expected losses, and by losses as far off as these may be."""
    facts = _facts(run, options, samples)
    found = _measured(run, options, samples, facts, root)
    losses = [[sum(column) for column in zip(*(found.losses[n] for n in group), strict=True)] for group in table.groups]
    choices = _choices(table, losses, run.tune.seed)
    picks = [
        {name: index for group, index in zip(table.groups, choice, strict=True) for name in group} for choice in choices
    ]
    tried = _tried(run, options, picks, samples, facts, root)
    best = tried.index(min(tried))
    expected = sum(row[index] for row, index in zip(losses, choices[best], strict=True))
    return _Found(picks[best], expected, tried[best], len(picks), found.tokens, found.guessed)


def _choices(table: _Table, losses: list[list[float]], seed: int) -> list[list[int]]:
    """The best choice by these losses, and others that would be the best if each were off by chance."""
    random = np.random.default_rng(seed)
    found = [solve(table.costs, losses, table.budget)]
    for _ in range(2 * TRIALS):
        factors = np.exp(SPREAD * random.standard_normal(len(losses)))
        other = [[loss * factor for loss in row] for row, factor in zip(losses, factors.tolist(), strict=True)]
        choice = solve(table.costs, other, table.budget)
        if len(found) < TRIALS and choice not in found:
            found.append(choice)
    return found


def _tried(
    run: Compressor, options: Options, picks: list[dict[str, int]], samples: Samples, facts: Facts, root: Path | None
) -> list[float]:
    """The divergence of each choice, rounded to nearest; read back where an earlier run tried the same."""
    file = None if root is None else root / f"trials-{fingerprint({**facts, 'picks': picks})}.json"
    known = _read(file, "tried", len(picks)) if file is not None else None
    if known is None:
        with naming_the_lack("trying choices of schemes"):
            tried = divergences(run.streamed, options, picks, samples, run.amp, run.tune.search)
        known = {"tried": tried}
        _keep(file, known)
    return known["tried"]


def _measured(run: Compressor, options: Options, samples: Samples, facts: Facts, root: Path | None) -> Sensitivities:
    """Losses of each layer; read back where an earlier run measured the same."""
    file = None if root is None else root / f"sensitivity-{fingerprint(facts)}.json"
    known = _read(file, "losses", len(options)) if file is not None else None
    if known is not None:
        logger.info("AutoScheme: losses are known from an earlier run (%s)", file)
        return Sensitivities(**known)
    native = run.observe_original()
    with naming_the_lack("measuring how sensitive layers are"), _naming_gradients():
        found = measure(run.streamed, options, samples, native, run.amp, search=run.tune.search, seed=run.tune.seed)
    _keep(file, dataclasses.asdict(found))
    return found


@contextlib.contextmanager
def _naming_gradients() -> Iterator[None]:
    """Say what it means where a model's own code does not run backward.

    Raises:
        PlanError: it does not.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ReplayError) or is_out_of_memory(error):
            raise
        raise PlanError(
            f"AutoScheme needs gradients, and this model's forward has none that work ({error}): give the layers their "
            "schemes with layer_config, or one scheme for all"
        ) from error


def _keep(file: Path | None, values: dict[str, Any]) -> None:
    if file is not None:
        make_folder(file.parent)
        write_json(file, {**values, "sha256": fingerprint(values)})


def _read(file: Path, name: str, count: int) -> dict[str, Any] | None:
    """What an earlier run has kept, with so many entries under a name; None if there is nothing that can be used."""
    if not file.exists():
        return None
    try:
        known = read_json(file)
    except CheckpointError as error:
        logger.warning("%s; it is done again", error)
        return None
    if known.pop("sha256", None) == fingerprint(known) and len(known.get(name) or ()) == count:
        return known
    logger.warning("%s is damaged, so it is done again", file)
    return None


def _samples(run: Compressor, root: Path | None) -> Samples:
    """The run's own samples, or those of the dataset that AutoScheme was given: a few, cut short where they are text.

    Those on which the result is judged are not among them.
    """
    auto = run.auto
    count, length = auto.nsamples or NSAMPLES, auto.seqlen or SEQLEN
    run.load_data(root)
    samples = run.samples
    if auto.dataset is not None:
        wanted = dataclasses.replace(run.calibration, dataset=auto.dataset, nsamples=count, seqlen=length)
        samples = [complete_sample(run.model, sample) for sample in run.read(wanted, count).samples]
    stride = max(1, len(samples) // count)
    return [_cut(sample, length) for sample in samples[::stride][:count]]


def _cut(sample: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    text = set(sample) <= {"input_ids", "attention_mask", "decoder_input_ids"}
    return {key: value[..., :length] for key, value in sample.items()} if text else sample


def _facts(run: Compressor, options: Options, samples: Samples) -> Facts:
    """All that measured losses depend on."""
    known = ("source", "config", "dtype", "device", "auto_round", "torch", "transformers")
    facts = run.facts()
    return {
        **{key: facts[key] for key in known},
        "options": {name: [plan.scheme.to_dict() for plan in plans] for name, plans in options.items()},
        "data": _digest(samples),
        "seed": run.tune.seed,
        "search": run.tune.search,
    }


def _digest(samples: Samples) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for key in sorted(sample):
            digest.update(f"{key}{tuple(sample[key].shape)}".encode())
            digest.update(sample[key].contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
