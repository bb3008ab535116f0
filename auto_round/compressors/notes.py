"""What a run says beside its result: sentences for the report's warnings, and how fast the tuning was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from auto_round.calibration.native import NativeRun
from auto_round.compressors.experts import FLOOR
from auto_round.logger import logger
from auto_round.plan import LayerPlan, ModelPlan
from auto_round.speed import product_rate

Log = Sequence[Mapping[str, Any]]


def unquantized_head(head: LayerPlan | None) -> list[str]:
    """An output layer that was asked for and cannot be quantized, being the embedding."""
    return [f"{head.name} stays as it is: {head.reason}"] if head is not None and head.info.tied else []


def unreached_blocks(plan: ModelPlan, native: NativeRun) -> list[str]:
    missed = [block for block in plan.block_names if block not in native.blocks]
    if not missed:
        return []
    return [
        f"{len(missed)} blocks ({missed[0]} …) are not reached by the calibration text: they are rounded to nearest "
        "with searched scales"
    ]


def log_samples_alone(native: NativeRun) -> None:
    """Say which blocks take one sample at a time: that is slow, and changes no result."""
    alone = {block: joint.reason for (block, _), joint in native.joints.items() if not joint.joins}
    if alone and len(native.batch) and next(iter(native.batch.values())).shape[0] > 1:
        block, reason = next(iter(alone.items()))
        logger.info("samples pass one by one through %d blocks (%s: %s)", len(alone), block, reason)


def rare_experts(log: Log) -> list[str]:
    """How many experts the calibration text hardly reached."""
    seen = [block["experts"] for block in log if block.get("experts")]
    rare, total = sum(one["below_floor"] for one in seen), sum(one["experts"] for one in seen)
    if not rare:
        return []
    return [
        f"{rare} of {total} experts got fewer than {FLOOR} calibration tokens: they are rounded with scales searched "
        "on what all experts of their block are given; more samples (nsamples) reach more of them"
    ]


def tuning_rate(log: Log, device: torch.device, dtype: torch.dtype) -> dict[str, float] | None:
    """How close the tuning steps came to what this machine does in a large matrix product; None without tuning.

    dtype: in which the blocks' products are taken.

    Returns:
        flops, product_flops: of one second; fraction: the first of the second.
    """
    works = [block["work"] for block in log if block.get("work") and block["work"]["seconds"]]
    spent = sum(work["seconds"] for work in works)
    if not spent:
        return None
    rate = sum(work["flops"] * (work["steps"] - 1) for work in works) / spent
    most = product_rate(device, dtype)
    logger.info("tuning steps ran at %.0f GFLOP/s, %.0f %% of a large matrix product's", rate / 1e9, 100 * rate / most)
    return {"flops": rate, "product_flops": most, "fraction": rate / most}
