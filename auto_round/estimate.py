"""Memory, disk and time of a run before it starts: pure functions from a workload and a machine's measured speed.

How the formulas were found is told where they stand; `benchmarks/estimates.py` compares them with real runs. The
report of every run holds its estimate beside what was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from auto_round.algorithms.tuning import JUDGE_SAMPLES
from auto_round.budget import Working
from auto_round.calibration.passes import TOKENS
from auto_round.compressors.experts import FLOOR
from auto_round.speed import LayerShape, LayerSpeed, Speed
from auto_round.workload import BlockKind, Workload

RUNNING = 40 << 20  # bytes of code that is imported on the way, and of the allocator's and libraries' buffers
CONTEXT = 600 << 20  # bytes of a CUDA context and the libraries' kernels, on the device
OFFSETS = 4  # bytes per weight of the layer whose offsets are moved: their gradient
SCRATCH = 12  # bytes per weight of the layer in work: up to three float32 copies
STACK = 128 << 10  # bytes of the stack of a forward that waits in its middle, measured
READING = 9  # bytes per weight of a layer that is made a float again: its codes, and two float32 copies
READINGS = 45  # times a code is unpacked and made a float, which all that is done to check it takes; fitted
RUN_SECONDS = 0.1  # to open files, write configurations and the report
BLOCK_SECONDS = 0.01  # to find, load and release a block once; fitted, as is the next
LAYER_SECONDS = 0.0025  # the same, of each of its layers
KERNEL = 660 << 10  # bytes of a kernel that oneDNN compiles for an expert's number of tokens, measured
KERNELS = 1024  # of them are kept
COUNTS = 32  # different numbers of tokens that experts get, filled up as `cpu_linear.even` says; fitted
SCATTERED = 4  # times a block's bytes: holes that the many tensors of experts leave in the heap; fitted
HOLES = 0.6  # of the state and activations of a block with experts: the same; fitted
HEAD_PASSES = 5  # forwards that the output layer's work in a step of the training of scales is worth
MOST_HOLES = 512 << 20  # bytes; larger ones were not measured, and large tensors leave none
SCALE_STATE = 16  # bytes of a trained scale: its factor and gradient, two moments, and a copy that is written
CANDIDATES = 3  # that tuning compares: the start, one towards the end, and the last
PER_TOKEN = ("forward", "backward", "watch")
EVEN = 4  # times the floor that the mean expert should get: routers are far from even


@dataclass(frozen=True)
class Memory:
    """Peak of one memory in bytes, by what it is for; `total` is their sum.

    libraries: Python, torch, transformers. outside: parameters outside blocks. block: weights of a block, and the codes
    found for it. state: rounding offsets, gradients, momentum, the best state. activations: of a micro-batch.
    chains: what all samples bring to a block. logits: for the comparison of original and result. heap: what experts
    leave behind on a CPU.
    stage: what the peak comes from.
    """

    libraries: int = 0
    outside: int = 0
    block: int = 0
    state: int = 0
    activations: int = 0
    chains: int = 0
    logits: int = 0
    heap: int = 0
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
    work: Workload, output: Mapping[str, int], libraries: int, working: Working, speed: Speed | None = None
) -> Estimate:
    """Put everything together.

    Args:
        output: format → bytes of the weights that it will write.
        libraries: resident bytes of a process that has imported what it needs.
        working: where activations and logits wait. The size of micro-batches is the workload's.
    """
    spill = _chain_bytes(work) if working.keep == "file" else 0
    stored = work.outside_stored + sum(kind.stored * len(kind.names) for kind in work.blocks)
    host, device = memory(work, max(output.values(), default=0), libraries, working)
    return Estimate(
        host,
        device,
        Disk(dict(output), stored, spill),
        None if speed is None else seconds(work, speed, sum(output.values())),
        coverage(work),
    )


# ---- memory ------------------------------------------------------------------------------------------------------


def memory(work: Workload, output: int, libraries: int, working: Working) -> tuple[Memory, Memory | None]:
    """(RAM, VRAM) at the worst moment of the run, which is one of its stages for the largest block.

    On an accelerator the blocks and their state are there, and RAM holds codes, the logits and the files being read.
    The chains are where they are kept.
    """
    stages = [stage for kind in work.blocks for stage in _stages(work, kind, output, working)]
    worst = max(stages, key=lambda stage: stage.total, default=Memory())
    outside = work.outside_bytes
    if work.device.type == "cpu":
        return dataclasses.replace(worst, libraries=libraries + RUNNING, outside=worst.outside + outside), None
    largest = max((kind.nbytes + 2 * kind.quantized for kind in work.blocks), default=0)
    reload = max((stage.outside for stage in stages), default=0)
    chains = _stack_bytes(work) + (_chain_bytes(work) if working.keep == "memory" else 0)
    logits = _checking(work, working)
    host = Memory(libraries + 2 * RUNNING, reload, largest, 0, 0, chains, logits, "reading and writing blocks")
    on_device = [stage for stage in stages if not stage.stage.startswith("loading")]
    worst = max(on_device, key=lambda stage: stage.total, default=Memory())
    return host, dataclasses.replace(worst, libraries=CONTEXT, outside=outside)


def reloadable(work: Workload, libraries: int, ram: int) -> int:
    """Bytes of a result that can be loaded as a whole within `ram`: beside what is there anyway, and the logits."""
    scratch = SCRATCH * max((kind.largest for kind in work.blocks), default=0)
    rest = libraries + 2 * RUNNING + work.outside_bytes + scratch + 3 * _logits(work)
    return max(0, ram - rest + work.embedding_bytes)


def _stages(work: Workload, kind: BlockKind, output: int, working: Working) -> list[Memory]:
    """What each stage holds at its worst beside what is always there."""
    found = _held(work, kind, output, working)
    if kind.experts is None or work.device.type != "cpu":
        return found
    kernels = _kernel_bytes(work, kind)
    holes = [SCATTERED * kind.nbytes + int(HOLES * (stage.state + stage.activations)) for stage in found]
    return [
        dataclasses.replace(stage, heap=kernels + min(MOST_HOLES, left))
        for stage, left in zip(found, holes, strict=True)
    ]


def _kernel_bytes(work: Workload, kind: BlockKind) -> int:
    """Of products of experts: on the check batch, on all samples, and twice in the backward."""
    shapes = sum(share < 1 for _, share in kind.layers.values())
    products = 1 + work.needs_data + 2 * (work.needs_data and work.tune.iters > 0)
    return KERNEL * min(KERNELS, shapes * products * COUNTS)


def _held(work: Workload, kind: BlockKind, output: int, working: Working) -> list[Memory]:
    """What each stage holds by its own account."""
    codes = kind.quantized + kind.stored  # a byte each, and packed to be written
    scratch = SCRATCH * kind.largest
    checking, logits = _checking(work, working), _logits(work) if working.logits == "memory" else 0
    reading = Memory(block=kind.nbytes + kind.stored + READING * kind.largest, logits=logits, stage="reading a block")
    found = [reading, Memory(logits=checking, stage="comparing with the original")]
    if output <= working.reload:
        again = max(0, output - work.embedding_bytes)  # rows of an embedding are mapped, and few are touched
        found.append(Memory(outside=again, block=scratch, logits=checking, stage="loading the result again"))
    if not work.needs_data:
        return [*found, Memory(block=kind.nbytes + codes, logits=logits, stage="rounding a block")]
    on_cpu = work.device.type == "cpu"
    chains = _chain_bytes(work) if working.keep == "device" or (on_cpu and working.keep == "memory") else 0
    chains += _stack_bytes(work) if on_cpu else 0
    block = Memory(block=kind.nbytes + codes, logits=logits, chains=chains, stage="following the samples")
    found.append(dataclasses.replace(block, activations=work.micro * _forward_bytes(work, kind)))
    if work.tune.iters:
        tuned = dataclasses.replace(block, block=kind.nbytes, state=_state_bytes(work, kind), stage="tuning a block")
        found.append(dataclasses.replace(tuned, activations=work.micro * _kept_bytes(work, kind)))
    if work.tune.scale_iters:
        found.append(_training_scales(work, kind))
    return found


def _training_scales(work: Workload, kind: BlockKind) -> Memory:
    """What a step of the training of scales holds: hidden states of its samples before and after each block.

    Of one block there are the weights, their gradients and codes; of a forward, three times its logits in float32.
    """
    blocks = sum(len(kind.names) for kind in work.blocks)
    size = min(work.tune.samples_per_step, work.samples) * work.length
    together = max(work.length, TOKENS)
    groups = sum(_groups(one) * len(one.names) for one in work.blocks)
    return Memory(
        block=2 * kind.nbytes + kind.stored + READING * kind.largest,
        state=SCALE_STATE * groups,
        activations=together * (_kept_bytes(work, kind) + 3 * 4 * work.vocabulary),
        chains=size * work.glue.hidden * work.itemsize * (2 * blocks + 2),
        stage="training scales",
    )


def _groups(kind: BlockKind) -> int:
    """Scales of a block's layers."""
    return sum(
        count * (shape.numel // shape.spec.group_size if _by_group(shape) else shape.out_features)
        for shape, (count, _) in kind.layers.items()
        if shape.spec is not None
    )


def _by_group(shape: LayerShape) -> bool:
    return isinstance(shape.spec.group_size, int) and shape.spec.group_size > 0


def _logits(work: Workload) -> int:
    return work.check_tokens * work.vocabulary * work.itemsize


def _checking(work: Workload, working: Working) -> int:
    """Logits while two models are compared: the original's, where they are not in a file, and two more."""
    return _logits(work) * (3 if working.logits == "memory" else 2)


def _chain_bytes(work: Workload) -> int:
    """Hidden states of all samples: of the original, of the quantized model, and the wanted outputs.

    A forward that waits in its middle holds what it began with, the embeddings of its tokens, as well.
    """
    return work.tokens * work.glue.hidden * work.itemsize * (5 if work.noisy else 3)


def _stack_bytes(work: Workload) -> int:
    """In RAM, of the forwards that wait."""
    return STACK * work.samples * (2 if work.noisy else 1) if work.needs_data else 0


def _forward_bytes(work: Workload, kind: BlockKind) -> int:
    """Per token of a forward without gradients: three tensors of the widest layer, and its input's squares."""
    return kind.widest * (3 * work.itemsize + 3 * 4)


def _kept_bytes(work: Workload, kind: BlockKind) -> int:
    """Per token of a forward whose gradients are wanted: every layer's output and input, norms in float32."""
    return 2 * kind.channels * work.itemsize + 8 * work.glue.hidden * 4


def _state_bytes(work: Workload, kind: BlockKind) -> int:
    """Per weight: its offset in float32, what the algorithm keeps, the rounded weight and its gradient, the codes of
    the best state. Gradients of offsets exist for one layer at a time."""
    per_weight = 4 + work.moments + 2 * work.itemsize + (not work.tune.not_use_best_mse)
    return kind.quantized * per_weight + OFFSETS * kind.largest


# ---- time --------------------------------------------------------------------------------------------------------


def seconds(work: Workload, speed: Speed, output: int) -> dict[str, float]:
    """Seconds of each stage.

    original: the check tokens pass every block twice, and a row of them once more. follow: all samples pass every block
    in the original, and once more in the quantized model. judge: samples on which candidates are compared. steps: the
    tuning itself, a forward and a backward of `samples_per_step` samples and a step of the weights; the first one is
    slower, as its operations are counted, by about what loading the layers takes. verify: the quantized model runs
    twice here, and once in Transformers; codes are read to be exported, and `READINGS` stands for unpacking, comparing
    and copying them in all checks. scales: each step of their training takes its samples through the original, through
    the quantized model, and once more for the gradients.
    """
    check = work.check_tokens
    totals = dict.fromkeys(("original", "follow", "search", "judge", "steps", "export", "verify"), 0.0)
    head = check * speed.layers[work.head].forward if work.head is not None else 0.0
    totals["original"], totals["verify"] = 1.25 * head + RUN_SECONDS, 3 * head
    for kind in work.blocks:
        count, block = len(kind.names), _block_speed(kind, speed)
        load = _load(kind)
        totals["export"] += count * block.read
        totals["original"] += count * (2.25 * check * block.forward + load)
        totals["search"] += count * (block.quantize + load)
        totals["verify"] += count * (3 * check * block.forward + READINGS * block.read + 2 * load)
        totals["follow"] += count * work.tokens * (block.forward * (2 if work.noisy else 1) + block.watch)
        if work.needs_data and work.tune.iters:
            judged = min(JUDGE_SAMPLES, work.samples) * work.length
            stepped = work.tune.iters * min(work.tune.samples_per_step, work.samples) * work.length
            totals["judge"] += count * CANDIDATES * (judged * block.forward + block.judge)
            totals["steps"] += count * (
                stepped * (block.forward + block.backward) + work.tune.iters * block.tune + load
            )
    if work.tune.scale_iters:
        totals["scales"] = work.tune.scale_iters * _step_of_scales(work, speed)
    totals["export"] += speed.write * (output + sum(kind.stored * len(kind.names) for kind in work.blocks))
    totals["verify"] += speed.write * output
    return totals


def _step_of_scales(work: Workload, speed: Speed) -> float:
    """Seconds of one step of the training of scales."""
    size = min(work.tune.samples_per_step, work.samples) * work.length
    total = size * HEAD_PASSES * speed.layers[work.head].forward if work.head is not None else 0.0
    for kind in work.blocks:
        block = _block_speed(kind, speed)
        passes = size * (3 * block.forward + max(block.backward, 2 * block.forward))
        total += len(kind.names) * (passes + 2 * (block.read + _load(kind)))
    return total


def _load(kind: BlockKind) -> float:
    """Seconds to find, load and release a block."""
    return BLOCK_SECONDS + LAYER_SECONDS * sum(number for number, _ in kind.layers.values())


def _block_speed(kind: BlockKind, speed: Speed) -> LayerSpeed:
    """Seconds of a block: forward, backward and watch for each token, the others for all its weights."""
    total = {"forward": speed.glue, "backward": speed.glue_back}
    for shape, (count, share) in kind.layers.items():
        for name, value in vars(speed.layers[shape]).items():
            each = share if name in PER_TOKEN else shape.numel
            total[name] = total.get(name, 0.0) + count * each * value
    return LayerSpeed(**total)


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
