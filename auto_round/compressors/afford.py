"""Whether this machine has what a run needs, and what to change if it has not."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from auto_round.algorithms import rule, state_bytes
from auto_round.budget import DoesNotFitError, Working
from auto_round.compressors.samples import longest_sample
from auto_round.earlier import earlier_runs
from auto_round.estimate import Estimate, estimate
from auto_round.formats import FORMATS, make_format
from auto_round.formats.base import ExportFormat
from auto_round.formats.export import planned_bytes
from auto_round.logger import logger
from auto_round.plan import LayerPlan, ModelPlan, PlanError
from auto_round.report import size
from auto_round.speed import Setting, Speed, measure
from auto_round.utils.device import free_memory, resident_bytes
from auto_round.workload import Workload, workload

if TYPE_CHECKING:
    from auto_round.compressors.base import Compressor


@dataclass(frozen=True)
class Resources:
    """Bytes that can be had: RAM and VRAM beyond what this process holds, disk. None where it is not known."""

    ram: int | None
    disk: int | None
    vram: int | None = None


_DIGITS = re.compile(r"\d+")


def resources(folder: Path, device: torch.device) -> Resources:
    """What there is now. folder: where the result goes; it need not exist."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    vram = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return Resources(free_memory(), shutil.disk_usage(folder).free, vram)


def allowed(run: Compressor, there: Resources) -> Resources:
    """What the run may have of what there is."""
    told = None if run.budget.ram is None else max(0, run.budget.ram - resident_bytes())
    free = None if there.ram is None else there.ram // run.ranks.here  # all ranks of a machine need as much
    ram = [limit for limit in (free, told) if limit is not None]
    vram = [limit for limit in (there.vram, run.budget.of(run.device)) if limit is not None]
    return Resources(min(ram, default=None), there.disk, min(vram, default=None))


def work_of(run: Compressor, working: Working | None = None) -> Workload:
    """A run's workload under its present settings: that of one rank. working: None for what was chosen."""
    length = longest_sample(run.calibration.seqlen, run.model, run.tokenizer)
    chosen = run.working if working is None else working
    asked = (run.plan, run.tune, run.calibration, chosen.halvings)
    for known, work in run.workloads:  # to count a hundred experts in each of a hundred blocks takes seconds
        if all(one is other for one, other in zip(known, asked, strict=True)):
            return work
    moments = state_bytes(run.algorithm_name, run.tune)
    samples = -(-run.calibration.nsamples // run.ranks.world)
    wanted = (run.tune, samples, length, run.needs_data)
    run.workloads.append((asked, workload(run.streamed, run.plan, *wanted, chosen, moments)))
    return run.workloads[-1][1]


def speed_of(run: Compressor, work: Workload) -> Speed:
    """How fast this machine is at the run's work: measured once for all work of a kind, so that estimates agree."""
    moves = rule(run.algorithm_name, work.tune) if work.tune.iters and work.needs_data else None
    kind = (tuple(work.shapes), work.glue, work.tune.search, moves is None)
    if kind not in run.speeds:
        dtype = getattr(run.model, "dtype", torch.float32)
        setting = Setting(run.device, dtype, run.amp, work.tune.search, moves)
        run.speeds[kind] = measure(work.shapes, work.glue, setting)
    return run.speeds[kind]


def estimate_run(run: Compressor, work: Workload, output: Mapping[str, int]) -> Estimate:
    """What a run will need. output: format → bytes of its weights."""
    libraries = resident_bytes()  # before measuring, which leaves buffers behind
    return estimate(work, output, libraries, run.working, speed_of(run, work))


def output_sizes(run: Compressor, formats: Sequence[ExportFormat]) -> dict[str, int]:
    return {fmt.name: planned_bytes(run.streamed, fmt.plan, fmt) for fmt in formats}


def possible_sizes(run: Compressor, known: ExportFormat, nbytes: int) -> dict[str, int]:
    """Format → bytes of its weights, for every format that can hold the plan.

    Formats differ in the layers that are quantized alone, so the rest is taken from one that is known.
    """
    if known.plain:
        return {known.name: nbytes}
    plan, counts = _one_of_each(run.plan)
    held = make_format(known.name, plan).plan
    rest = nbytes - _packed_bytes(known, held, counts) - _kept_drafts(plan, held, counts)
    found: dict[str, int] = {}
    for name in FORMATS:
        try:
            fmt = make_format(name, plan)
        except PlanError:
            continue
        if not fmt.plain:
            found[name] = rest + _packed_bytes(fmt, fmt.plan, counts) + _kept_drafts(plan, fmt.plan, counts)
    return found


def _kept_drafts(plan: ModelPlan, held: ModelPlan, counts: Mapping[str, int]) -> int:
    """Bytes of layers that are quantized in a plan and not in what a format holds of it."""
    layers = (layer for name, layer in plan.quantized().items() if not held.layers[name].is_quantized)
    return sum(counts[layer.name] * layer.info.numel * layer.info.dtype.itemsize for layer in layers)


def _one_of_each(plan: ModelPlan) -> tuple[ModelPlan, dict[str, int]]:
    """The plan with one of all layers that differ in the numbers of their names alone, and for how many each stands."""
    first: dict[tuple, str] = {}
    counts: dict[str, int] = {}
    for name, layer in plan.quantized().items():
        key = (_DIGITS.sub("#", name), _anonymous(layer), layer.scheme)
        lead = first.setdefault(key, name)
        counts[lead] = counts.get(lead, 0) + 1
    kept = {name: layer for name, layer in plan.layers.items() if name in counts or not layer.is_quantized}
    return dataclasses.replace(plan, layers=kept), counts


def _packed_bytes(fmt: ExportFormat, plan: ModelPlan, counts: Mapping[str, int]) -> int:
    """Bytes of all layers as a format stores them."""
    total = 0
    for name, layer in plan.quantized().items():
        layout = fmt.layout(layer).values()
        total += counts[name] * sum(torch.Size(part.shape).numel() * part.dtype.itemsize for part in layout)
    return total


def _anonymous(layer: LayerPlan) -> tuple:
    info = layer.info
    return info.out_features, info.in_features, info.transposed, info.has_bias, info.dtype, info.role, info.fused


def check_fits(run: Compressor, formats: Sequence[ExportFormat], base: Path, force: bool) -> Estimate:
    """Estimate what a run needs, and refuse one that this machine cannot do. base: the folder of its result.

    Raises:
        DoesNotFitError: too little memory. OSError: too little disk space. Both say what to change.
    """
    words = earlier_runs(base.parent).words()
    if words:
        logger.info("estimates of earlier runs here: %s", words)
    work = work_of(run)
    found = estimate_run(run, work, output_sizes(run, formats))
    kept = base.with_name(base.name + ".work")
    existing = sum(file.stat().st_size for file in kept.rglob("*.safetensors")) if kept.is_dir() else 0
    memory, disk = problems(run, work, found, allowed(run, resources(base.parent, run.device)), existing)
    said = [*memory, *disk]
    if said and not force:
        kind = DoesNotFitError if memory else OSError
        raise kind(f"{'; '.join(said)}; or go on in spite of it with force=True (--force)")
    run.warnings += [f"started by force, although {problem}" for problem in said]
    return found


# ---- what does not fit -------------------------------------------------------------------------------------------


def problems(
    run: Compressor, work: Workload, found: Estimate, there: Resources, existing: int = 0
) -> tuple[list[str], list[str]]:
    """Sentences about (memory, disk) that do not suffice, and what to change; empty if they do.

    existing: bytes of the work folder that an earlier run has left.
    """
    memory, disk = [], []
    extra = found.ram.total - resident_bytes()
    if there.ram is not None and extra > there.ram:
        memory.append(
            f"the run needs {size(found.ram.total)} of RAM ({_largest_parts(found.ram)}) and "
            f"{size(there.ram + resident_bytes())} can be had: {_advice(run, work, found, there)}"
        )
    if found.vram is not None and there.vram is not None and found.vram.total > there.vram:
        memory.append(
            f"{run.device} has {size(there.vram)} free and the run needs {size(found.vram.total)} "
            f"({_largest_parts(found.vram)}): {_advice(run, work, found, there)}"
        )
    needed = found.disk.total - min(existing, found.disk.work)
    if there.disk is not None and needed > there.disk:
        disk.append(
            f"the output's disk has {size(there.disk)} free and the run writes {size(needed)} (result "
            f"{size(sum(found.disk.output.values()))}, work folder {size(found.disk.work)}, activations "
            f"{size(found.disk.spill)}): make room or choose another output folder"
        )
    return memory, disk


def _largest_parts(memory) -> str:
    parts = {k: v for k, v in dataclasses.asdict(memory).items() if isinstance(v, int) and v}
    largest = sorted(parts, key=parts.__getitem__, reverse=True)[:3]
    return ", ".join(f"{name} {size(parts[name])}" for name in largest) + f", while {memory.stage}"


def _advice(run: Compressor, work: Workload, found: Estimate, there: Resources) -> str:
    """The mildest change of settings with which the run fits."""
    largest = max(found.disk.output.values(), default=0)
    for words, changed in _lighter(work):
        other = estimate(changed, {"": largest}, resident_bytes(), run.working)
        if other.ram.total - resident_bytes() <= (there.ram or 0) and _fits_device(other, there):
            return f"with {words} it fits"
    return "no setting makes it fit, so it needs a machine with more memory"


def _fits_device(found: Estimate, there: Resources) -> bool:
    return found.vram is None or there.vram is None or found.vram.total <= there.vram


def _lighter(work: Workload):
    """Settings that need less memory, the mildest first."""
    if work.needs_data:
        for length in (1024, 512, 256):
            if length < work.length:
                micro = max(1, work.micro * length // work.length) if work.device.type != "cpu" else work.micro
                yield f"seqlen={length}", dataclasses.replace(work, length=length, micro=micro)
        short = dataclasses.replace(work, length=min(work.length, 512), micro=min(work.micro, 512))
        yield "seqlen=512 and batch_size=1", short
    if work.tune.scale_iters:
        yield "scale_iters=0", dataclasses.replace(work, tune=dataclasses.replace(work.tune, scale_iters=0))
    if work.tune.iters:
        yield "iters=0", dataclasses.replace(work, tune=dataclasses.replace(work.tune, iters=0))
    if work.needs_data:
        plain = dataclasses.replace(work.tune, iters=0, search=False)
        yield "iters=0 and disable_opt_rtn", dataclasses.replace(work, tune=plain, needs_data=False)
