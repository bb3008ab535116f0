"""Calibration samples that come as token ids: lists, tensors, batches of a data loader; taken as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from auto_round.calibration.hub import CalibrationDataError
from auto_round.calibration.samples import CalibrationData, Sample, finish, is_token_sample


def take_given(dataset: Any, tokenizer: Any, seqlen: int, nsamples: int, holdout: int) -> CalibrationData:
    """Take samples as they are, in their order, cut to `seqlen`; those after the first `nsamples` are held out."""
    if isinstance(dataset, (Mapping, torch.Tensor, np.ndarray)):
        label, dataset = "one batch", [dataset]
    elif isinstance(dataset, (list, tuple)):
        label = f"list of {len(dataset)} samples"
    elif isinstance(dataset, Iterable):
        label = type(dataset).__name__
    else:
        raise CalibrationDataError(
            f"Calibration data cannot be a {type(dataset).__name__}; "
            "give a path, a data set name, a list of texts or samples, or a data loader."
        )
    vocabulary = _vocabulary_size(tokenizer)
    batches = (as_batch(item, f"Calibration sample {index + 1}") for index, item in enumerate(dataset))
    stream = chain.from_iterable(split_batch(batch, f"Batch {index + 1}") for index, batch in enumerate(batches))
    taken = list(islice(stream, nsamples + holdout))
    if not taken:
        raise CalibrationDataError(f"The calibration data ({label}) is empty; give at least one sample.")
    for index, sample in enumerate(taken):
        if is_token_sample(sample):
            _check_ids(sample["input_ids"], vocabulary, f"Calibration sample {index + 1}")
    notes = []
    longer = sum(is_token_sample(sample) and sample["input_ids"].shape[-1] > seqlen for sample in taken)
    if longer:
        notes.append(f"{longer} samples were longer than {seqlen} tokens and were cut to them")
    if len(taken) < nsamples:
        notes.append(f"{len(taken)} samples were given; {nsamples} were asked for")
    taken = [_truncate(sample, seqlen) for sample in taken]
    return finish(taken[:nsamples], taken[nsamples:], label, holdout, notes)


def as_batch(item: Any, where: str) -> Sample:
    """One element of the data as tensors with a leading batch dimension, "input_ids" [B, L] among them."""
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], (torch.Tensor, np.ndarray, Mapping)):
        item = item[0]  # (input_ids, labels, ...): what follows the ids is for training
    if not isinstance(item, Mapping):
        item = {"input_ids": item}
    batch = {key: _as_tensor(value, f"{where}, {key!r}") for key, value in item.items() if value is not None}
    if not batch:
        raise CalibrationDataError(f"{where} is empty.")
    if not is_token_sample(batch):
        return batch  # what else a model takes (audio, code books) is passed on as it is
    ids = batch["input_ids"]
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() not in (1, 2) or ids.numel() == 0:
        raise CalibrationDataError(
            f"{where} has input_ids of shape {list(ids.shape)} and type {ids.dtype}; give integers [L] or [1, L]."
        )
    if ids.dim() == 1:
        batch = {key: value.unsqueeze(0) for key, value in batch.items()}
    batch["input_ids"] = batch["input_ids"].to(torch.int64)
    return batch


def _as_tensor(value: Any, where: str) -> torch.Tensor:
    try:
        return value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationDataError(
            f"{where} is a {type(value).__name__} that cannot be made a tensor; give token ids or tensors."
        ) from error


def split_batch(batch: Sample, where: str) -> list[Sample]:
    """Samples of one row, of tensors that agree on the number of rows."""
    size = batch["input_ids"].shape[0] if is_token_sample(batch) else 1
    if size == 1:
        return [batch]
    odd = [key for key, value in batch.items() if value.dim() and value.shape[0] != size]
    if odd:
        raise CalibrationDataError(
            f"{where} of {size} samples cannot be split, since {odd[0]!r} has shape {list(batch[odd[0]].shape)}; "
            "use a data loader with batch_size=1."
        )
    return [{key: value[i : i + 1] if value.dim() else value for key, value in batch.items()} for i in range(size)]


def _truncate(sample: Sample, seqlen: int) -> Sample:
    length = sample["input_ids"].shape[-1] if is_token_sample(sample) else 0
    if length <= seqlen:
        return sample
    return {key: _truncate_tensor(value, length, seqlen) for key, value in sample.items()}


def _truncate_tensor(value: torch.Tensor, length: int, seqlen: int) -> torch.Tensor:
    if value.dim() < 2 or value.shape[-1] != length:
        return value
    if value.dim() == 4 and value.shape[-2] == length:  # an attention mask [1, 1, L, L]
        value = value[..., :seqlen, :]
    return value[..., :seqlen]


def _vocabulary_size(tokenizer: Any) -> int | None:
    """One more than the largest id that the tokenizer knows; ids may have gaps, so its length is not enough."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return None
    return max(tokenizer.get_vocab().values(), default=-1) + 1 or None


def _check_ids(ids: torch.Tensor, vocabulary: int | None, where: str) -> None:
    low, high = int(ids.min()), int(ids.max())
    if vocabulary is not None and (low < 0 or high >= vocabulary):
        raise CalibrationDataError(
            f"{where} holds the token id {low if low < 0 else high}, outside the tokenizer's vocabulary of "
            f"{vocabulary}; were the ids made with another tokenizer?"
        )
