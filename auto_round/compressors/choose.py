"""How a run works within the memory that it may use: the fastest settings whose estimate fits, chosen before it starts.

Where activations and logits wait changes no bit of a result, so it follows what is free, too. The size of micro-batches
changes rounding: it follows `max_memory` alone, and belongs to what a result depends on (`Compressor.facts`). So a run
that goes on later, with more or less memory free, ends as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from auto_round.budget import RELOAD_LIMIT, Budget, Working
from auto_round.compressors.afford import Resources, resources, work_of
from auto_round.estimate import memory, reloadable
from auto_round.utils.device import resident_bytes
from auto_round.workload import Workload

if TYPE_CHECKING:
    from auto_round.compressors.base import Compressor

LIBRARIES = 450 << 20  # bytes of RAM, a constant: what is resident differs from one start to the next
SPARED = 0.5  # share of the free RAM that is left to others where a file does as well
MARGIN = 0.9  # share of what is free that an estimate may claim, as estimates are not exact


def choose_for(run: Compressor) -> Working:
    """The settings of a run, from its budget and from what is free now."""
    work = work_of(run, Working())
    there = resources(Path(), run.device)
    if there.ram is not None:
        there = dataclasses.replace(there, ram=there.ram // run.ranks.here)
    return choose(work, run.budget, there, resident_bytes())


def choose(work: Workload, budget: Budget, there: Resources, resident: int) -> Working:
    """The fastest settings whose estimate is within the budget and within what is free; else the thriftiest.

    Args:
        work: with the usual micro-batch. resident: bytes that the process holds; `there` is what is free beside them.
    """
    halvings = _halvings(work, budget)
    work = with_halvings(work, halvings)
    share = SPARED if budget.sparing else MARGIN
    free = None if there.ram is None else resident + int(there.ram * share)
    spare = None if there.vram is None else int(there.vram * MARGIN)
    ram, vram = _least(budget.ram, free), _least(budget.of(work.device), spare)
    reload = _reload(work, budget)
    places = [Working(halvings, keep, logits, reload) for keep, logits in _places(work, budget)]
    return next((one for one in places if _fits(work, one, resident, ram, vram)), places[-1])


def with_halvings(work: Workload, halvings: int) -> Workload:
    """The same work in smaller micro-batches."""
    together = work.micro // work.length
    if not (work.needs_data and together):
        return work
    return dataclasses.replace(work, micro=Working(halvings).micro(together) * work.length)


def _halvings(work: Workload, budget: Budget) -> int:
    """As few as the budget allows. Depends on nothing but the work and the budget, so that it repeats."""
    if not (budget.is_told and work.needs_data):
        return 0
    tried = range(max(1, (work.micro // work.length).bit_length()))
    limits = budget.ram, budget.of(work.device)
    for halvings in tried:
        if _fits(with_halvings(work, halvings), Working(halvings, "file", "file"), LIBRARIES, *limits):
            return halvings
    return tried[-1]


def _reload(work: Workload, budget: Budget) -> int:
    """Bytes of a result that is loaded as a whole to check it: a budget is no reason to refuse a run for its check."""
    return RELOAD_LIMIT if budget.ram is None else min(RELOAD_LIMIT, reloadable(work, LIBRARIES, budget.ram))


def _places(work: Workload, budget: Budget) -> Iterator[tuple[str, str]]:
    """(keep, logits), the fastest first."""
    if work.device.type != "cpu" and not budget.off_device:
        yield "device", "memory"
    yield "memory", "memory"
    yield "file", "memory"
    yield "file", "file"


def _fits(work: Workload, working: Working, libraries: int, ram: int | None, vram: int | None) -> bool:
    host, device = memory(work, 0, libraries, working)
    fits_device = device is None or vram is None or device.total <= vram
    return fits_device and (ram is None or host.total <= ram)


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
