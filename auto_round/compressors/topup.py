"""Per-expert top-up: of more samples than are needed, those are taken that reach the experts which get few tokens.

Which experts a sample reaches is seen by running the original once over all candidates. Three quarters of the samples
stay the ones that would have been used anyway, so that the text as a whole stays what was asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from auto_round.budget import Working
from auto_round.calibration.data import CalibrationData
from auto_round.compressors.chain import Chain
from auto_round.compressors.experts import FLOOR, expert_groups
from auto_round.formats.writer import write_json
from auto_round.logger import logger
from auto_round.modeling.reading import read_json

if TYPE_CHECKING:
    from auto_round.compressors.base import Compressor

CHOSEN = 0.25  # share of the samples that are chosen for the experts that they reach
ONE_BY_ONE = Working(halvings=64)  # so that tokens are counted sample by sample


def candidates(run: Compressor) -> int:
    """How many samples are read for a run: more than it uses, where it has experts and tops them up.

    Samples may be wanted to find the blocks with, before it is known whether they have experts.
    """
    wanted = run.calibration.nsamples if run.needs_data or run.auto is not None else 1
    routed = run.needs_data and (run.plan is None or bool(expert_groups(run.plan.layers)))
    return wanted * (1 + run.calibration.expert_topup) if routed else wanted


def topped_up(run: Compressor) -> CalibrationData:
    """A run's data with as many samples as it uses, of those that were read; the same on every rank, and later on."""
    data, wanted = run.data, run.calibration.nsamples
    if len(data.samples) <= wanted:
        return data
    if not expert_groups(run.plan.layers):
        return dataclasses.replace(data, samples=data.samples[:wanted])
    chosen = None
    if run.ranks.main:
        file = run.store.scratch("samples.json")
        if not file.exists():
            write_json(file, {"chosen": choose(_tokens_of_experts(run), wanted, FLOOR)})
        chosen = read_json(file)["chosen"]
    run.ranks.barrier()
    chosen = json.loads(run.ranks.everyone(json.dumps(chosen).encode())[0])
    samples = tuple(data.samples[index] for index in chosen)
    other = sum(index >= wanted for index in chosen)
    note = f"{other} of {wanted} samples were chosen of {len(data.samples)} for the experts that get few tokens"
    logger.info(note)
    tokens = sum(sample["input_ids"].numel() for sample in samples if "input_ids" in sample)
    return dataclasses.replace(data, samples=samples, tokens=tokens, notes=(*data.notes, note))


def choose(counts: torch.Tensor, wanted: int, floor: int) -> list[int]:
    """Which samples to use, in their order: the first three quarters of `wanted`, and those that serve experts most.

    A sample serves by the tokens that it gives to experts below `floor`; where none serves, the next one is taken.

    Args:
        counts: tokens that each sample gives each expert, [samples, experts].
    """
    chosen = list(range(wanted - int(wanted * CHOSEN)))
    left = list(range(len(chosen), len(counts)))
    held = counts[chosen].sum(0)
    while len(chosen) < wanted:
        lack = (floor - held).clamp_min(0)
        gains = torch.minimum(counts[left], lack).sum(1)
        index = left.pop(int(gains.argmax()))  # the first of equals
        chosen.append(index)
        held = held + counts[index]
    return sorted(chosen)


def _tokens_of_experts(run: Compressor) -> torch.Tensor:
    """Tokens that each candidate gives each expert, int64 [samples, experts]; as many samples at once as a run has."""
    samples, size = run.samples, run.calibration.nsamples
    parts = [_count(run, samples[start : start + size]) for start in range(0, len(samples), size)]
    return torch.cat(parts)


def _count(run: Compressor, samples: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    experts = _one_layer_of_each(run)
    column = {name: index for index, name in enumerate(experts)}
    counts = torch.zeros(len(samples), len(column), dtype=torch.int64)
    chain = Chain(run.model, run.native, samples, run.placement(), run.amp, 1, False, working=ONE_BY_ONE)
    with contextlib.closing(chain):
        while chain.place is not None:
            block, _ = chain.place
            with run.streamed.loaded(block) as module:
                layers = {name: column[name] for name in experts if experts[name] == block}
                with _counting(run.model, module, layers, counts):
                    chain.observe(module)
                chain.witness(module)
                chain.advance(module)
    return counts


def _one_layer_of_each(run: Compressor) -> dict[str, str]:
    """A layer of every expert → its block; all layers of an expert that take its input get the same tokens."""
    layers = run.plan.layers
    roles: dict[str, list[str]] = {}
    for (module, _), names in expert_groups(layers).items():
        roles.setdefault(module, names)
    return {name: layers[name].info.block for names in roles.values() for name in names if layers[name].info.block}


@contextlib.contextmanager
def _counting(model: nn.Module, module: nn.Module, columns: Mapping[str, int], counts: torch.Tensor) -> Iterator[None]:
    """While open, every call of a block is the next sample's, and the rows that enter each layer are counted."""
    sample = -1

    def begin(block, args, kwargs):
        nonlocal sample
        sample += 1

    def count(column: int):
        def add(layer, args):
            counts[sample, column] += args[0].numel() // args[0].shape[-1]

        return add

    handles = [module.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [model.get_submodule(name).register_forward_pre_hook(count(at)) for name, at in columns.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
