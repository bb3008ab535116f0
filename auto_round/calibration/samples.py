"""What a model is calibrated on, however it was found: samples, held-out ones, and what identifies them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

Sample = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CalibrationData:
    """What a model is calibrated on.

    Attributes:
        samples: each holds at least "input_ids", int64 [1, L]; other tensors have a leading dimension of 1 too,
            unless they came in a sample of one that is passed on unchanged.
        source: where the samples come from, in words.
        tokens: number of token ids in `samples`.
        sha256: digest of the token ids of `samples` in order (little-endian int64).
        notes: what a person should know, such as that fewer samples were found than asked for.
        held_out: further samples that are not in `samples`, for measuring; see `build_calibration`.
        documents: of how many documents `samples` hold something; None where that is not known.
    """

    samples: tuple[Sample, ...]
    source: str
    tokens: int
    sha256: str
    notes: tuple[str, ...]
    held_out: tuple[Sample, ...] = ()
    documents: int | None = None


def is_token_sample(sample: Mapping[str, torch.Tensor]) -> bool:
    """Whether a sample is made of token ids [L] or [B, L], which can be counted, split and cut."""
    return "input_ids" in sample and sample["input_ids"].dim() < 3


def finish(
    samples: list[Sample], fresh: list[Sample], source: str, holdout: int, notes: Sequence[str]
) -> CalibrationData:
    """Samples, and fresh ones to keep back, with their digest and number of tokens."""
    notes = list(notes)
    held_out = fresh[:holdout]
    if holdout and not held_out:
        held_out = samples[-holdout:]
        notes.append(f"the data has nothing left to keep back, so the last {len(held_out)} samples serve as held-out")
    elif len(held_out) < holdout:
        notes.append(f"{len(held_out)} samples could be kept back; {holdout} were asked for")
    digest = hashlib.sha256()
    for sample in samples:
        if is_token_sample(sample):
            digest.update(sample["input_ids"].cpu().numpy().astype("<i8").tobytes())
        for key in sorted(set(sample) - {"input_ids"} if is_token_sample(sample) else sample):
            digest.update(key.encode() + sample[key].contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    tokens = sum(sample["input_ids"].numel() for sample in samples if "input_ids" in sample)
    return CalibrationData(tuple(samples), source, tokens, digest.hexdigest(), tuple(notes), tuple(held_out))
