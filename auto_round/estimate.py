"""Memory, disk and time of a run before it starts: pure functions from a workload and a machine's measured speed.

How the formulas were found is told where they stand; `benchmarks/estimates.py` compares them with real runs. The
report of every run holds its estimate beside what was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from auto_round.algorithms.signround import JUDGE_SAMPLES
from auto_round.compressors.experts import FLOOR
from auto_round.speed import Speed
from auto_round.verify.logits import RELOAD_LIMIT
from auto_round.workload import BlockKind, Workload

RUNNING = 40 << 20  # bytes of code that is imported on the way, and of the allocator's and libraries' buffers
CONTEXT = 600 << 20  # bytes of a CUDA context and the libraries' kernels, on the device
SCRATCH = 12  # bytes per weight of the layer in work: up to three float32 copies
READINGS = 45  # times a code is unpacked and made a float, which all that is done to check it takes; fitted
RUN_SECONDS = 0.1  # to open files, write configurations and the report
BLOCK_SECONDS = 0.03  # to find, load and release a block once
EVEN = 4  # times the floor that the mean expert should get: routers are far from even


@dataclass(frozen=True)
class Memory:
    """Peak of one memory in bytes, by what it is for; `total` is their sum.

    libraries: Python, torch, transformers. outside: parameters outside blocks. block: weights of a block, and the codes
    found for it. state: rounding offsets, gradients, momentum, the best state. activations: of a micro-batch.
    chains: what all samples bring to a block. logits: for the comparison of original and result.
    stage: what the peak comes from.
    """

    libraries: int = 0
    outside: int = 0
    block: int = 0
    state: int = 0
    activations: int = 0
    chains: int = 0
    logits: int = 0
    stage: str = ""

    @property
    def total(self) -> int:
        return sum(value for value in dataclasses.asdict(self).values() if isinstance(value, int))


@dataclass(frozen=True)
class Disk:
    """Bytes written: outputs by format, the work folder that stays, activations that are removed on the way."""

    output: Mapping[str, int]
    work: int
    spill: int

    @property
    def total(self) -> int:
        return sum(self.output.values()) + self.work + self.spill


@dataclass(frozen=True)
class Coverage:
    """Calibration tokens that reach an expert on average, if the router were even."""

    experts: int
    chosen: int
    tokens: float
    floor: int = FLOOR


@dataclass(frozen=True)
class Estimate:
    """What a run will need. vram is None on a CPU; seconds, by stage, are None where speed was not measured."""

    ram: Memory
    vram: Memory | None
    disk: Disk
    seconds: Mapping[str, float] | None = None
    experts: Sequence[Coverage] = field(default_factory=tuple)

    @property
    def total_seconds(self) -> float | None:
        return None if self.seconds is None else sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with totals."""
        plain = dataclasses.asdict(self)
        for name in ("ram", "vram", "disk"):
            if plain[name] is not None:
                plain[name]["total"] = getattr(self, name).total
        plain["total_seconds"] = self.total_seconds
        return plain


def estimate(
    work: Workload, output: Mapping[str, int], libraries: int, budget: int, speed: Speed | None = None
) -> Estimate:
    """Put everything together.

    Args:
        output: format → bytes of the weights that it will write.
        libraries: resident bytes of a process that has imported what it needs.
        budget: bytes of activations per chain that stay in memory on a CPU.
    """
    spill = _chain_bytes(work) if _spills(work, budget) else 0
    stored = work.outside_stored + sum(kind.stored * len(kind.names) for kind in work.blocks)
    host, device = memory(work, max(output.values(), default=0), libraries, bool(spill))
    return Estimate(
        host,
        device,
        Disk(dict(output), stored, spill),
        None if speed is None else seconds(work, speed, sum(output.values())),
        coverage(work),
    )


# ---- memory ------------------------------------------------------------------------------------------------------


def memory(work: Workload, output: int, libraries: int, spilled: bool) -> tuple[Memory, Memory | None]:
    """(RAM, VRAM) at the worst moment of the run, which is one of its stages for the largest block.

    On an accelerator the blocks, their state and all chains are there, and RAM holds codes, the logits and the
    files being read.
    """
    stages = [stage for kind in work.blocks for stage in _stages(work, kind, output, spilled)]
    worst = max(stages, key=lambda stage: stage.total, default=Memory())
    outside = work.outside_bytes
    if work.device.type == "cpu":
        return dataclasses.replace(worst, libraries=libraries + RUNNING, outside=worst.outside + outside), None
    largest = max((kind.nbytes + 2 * kind.quantized for kind in work.blocks), default=0)
    reload = max((stage.outside for stage in stages), default=0)
    host = Memory(libraries + 2 * RUNNING, reload, largest, 0, 0, 0, 3 * _logits(work), "reading and writing blocks")
    on_device = [stage for stage in stages if not stage.stage.startswith("loading")]
    worst = max(on_device, key=lambda stage: stage.total, default=Memory())
    return host, dataclasses.replace(worst, libraries=CONTEXT, outside=outside)


def _stages(work: Workload, kind: BlockKind, output: int, spilled: bool) -> list[Memory]:
    """What each stage holds at its worst beside what is always there."""
    codes = kind.quantized + kind.stored  # a byte each, and packed to be written
    scratch = SCRATCH * kind.largest
    logits = _logits(work)
    found = [Memory(block=kind.nbytes + codes + scratch, logits=3 * logits, stage="comparing with the original")]
    if output <= RELOAD_LIMIT:
        again = max(0, output - work.embedding_bytes)  # rows of an embedding are mapped, and few are touched
        found.append(Memory(outside=again, block=scratch, logits=3 * logits, stage="loading the result again"))
    if not work.needs_data:
        return [*found, Memory(block=kind.nbytes + codes, logits=logits, stage="rounding a block")]
    chains = 0 if spilled else _chain_bytes(work)
    block = Memory(block=kind.nbytes + codes, logits=logits, chains=chains, stage="following the samples")
    found.append(dataclasses.replace(block, activations=work.micro * _forward_bytes(work, kind)))
    if work.tune.iters:
        tuned = dataclasses.replace(block, block=kind.nbytes, state=_state_bytes(work, kind), stage="tuning a block")
        found.append(dataclasses.replace(tuned, activations=work.micro * _kept_bytes(work, kind)))
    return found


def _logits(work: Workload) -> int:
    return work.check_tokens * work.vocabulary * work.itemsize


def _chain_bytes(work: Workload) -> int:
    """Hidden states of all samples: of the original, of the quantized model, and the wanted outputs."""
    return work.tokens * work.glue.hidden * work.itemsize * (3 if work.noisy else 2)


def _spills(work: Workload, budget: int) -> bool:
    """As `Chain` decides: on a CPU, a chain in float32 beyond the budget goes to a file."""
    return work.device.type == "cpu" and work.tokens * work.glue.hidden * 4 > budget


def _forward_bytes(work: Workload, kind: BlockKind) -> int:
    """Per token of a forward without gradients: three tensors of the widest layer, and its input's squares."""
    return kind.widest * (3 * work.itemsize + 3 * 4)


def _kept_bytes(work: Workload, kind: BlockKind) -> int:
    """Per token of a forward whose gradients are wanted: every layer's output and input, norms in float32."""
    return 2 * kind.channels * work.itemsize + 8 * work.glue.hidden * 4


def _state_bytes(work: Workload, kind: BlockKind) -> int:
    """Per weight: offset, gradient, momentum and best state in float32; the rounded weight, its gradient, its codes."""
    tune = work.tune
    floats = 2 + bool(tune.momentum) + (not tune.not_use_best_mse)
    return kind.quantized * (4 * floats + 2 * work.itemsize + 2) + SCRATCH * kind.largest


# ---- time --------------------------------------------------------------------------------------------------------


def seconds(work: Workload, speed: Speed, output: int) -> dict[str, float]:
    """Seconds of each stage.

    original: the check tokens pass every block twice, and a row of them once more. follow: all samples pass every block
    in the original, and once more in the quantized model. judge: samples on which candidates are compared. steps: the
    tuning itself, a forward and a backward of `samples_per_step` samples and a step of the weights. verify: the
    quantized model runs twice here, and once in Transformers; codes are read to be exported, and `READINGS` stands for
    unpacking, comparing and copying them in all checks.
    """
    check = work.check_tokens
    totals = dict.fromkeys(("original", "follow", "search", "judge", "steps", "export", "verify"), 0.0)
    head = check * speed.layers[work.head].forward if work.head is not None else 0.0
    totals["original"], totals["verify"] = 1.25 * head + RUN_SECONDS, 3 * head
    for kind in work.blocks:
        count = len(kind.names)
        forward, backward, quantize, read, tune = _block_speed(kind, speed)
        totals["export"] += count * read
        totals["original"] += count * (2.25 * check * forward + BLOCK_SECONDS)
        totals["search"] += count * quantize
        totals["verify"] += count * (3 * check * forward + READINGS * read + 2 * BLOCK_SECONDS)
        totals["follow"] += count * work.tokens * forward * (2 if work.noisy else 1)
        if work.needs_data and work.tune.iters:
            judged = 3 * min(JUDGE_SAMPLES, work.samples) * work.length
            stepped = work.tune.iters * min(work.tune.samples_per_step, work.samples) * work.length
            totals["judge"] += count * judged * forward
            totals["steps"] += count * (stepped * (forward + backward) + work.tune.iters * tune)
    totals["export"] += speed.write * (output + sum(kind.stored * len(kind.names) for kind in work.blocks))
    totals["verify"] += speed.write * output
    return totals


def _block_speed(kind: BlockKind, speed: Speed) -> tuple[float, float, float, float, float]:
    """(forward, backward) seconds per token, (quantize, read, one step) seconds, of a block."""
    forward, backward, quantize, read, tune = speed.glue, speed.glue_back, 0.0, 0.0, 0.0
    for shape, (count, share) in kind.layers.items():
        found = speed.layers[shape]
        forward += count * share * found.forward
        backward += count * share * found.backward
        quantize += count * shape.numel * found.quantize
        read += count * shape.numel * found.read
        tune += count * shape.numel * found.tune
    return forward, backward, quantize, read, tune


# ---- judgement ---------------------------------------------------------------------------------------------------


def coverage(work: Workload) -> tuple[Coverage, ...]:
    """Tokens per expert = tokens · chosen / experts, for each kind of block that has experts."""
    found = dict.fromkeys(kind.experts for kind in work.blocks if kind.experts is not None)
    return tuple(Coverage(one.count, one.chosen, work.tokens * one.chosen / one.count) for one in found)


def needed_samples(found: Coverage, work: Workload) -> int | None:
    """Samples with which the mean expert gets `EVEN` times the floor; None where the calibration set does already."""
    if not work.needs_data or found.tokens >= EVEN * found.floor:
        return None
    return -(-EVEN * found.floor * found.experts // (found.chosen * work.length))
