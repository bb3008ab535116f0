"""Calibration samples: from text, token ids or a data loader to a fixed, reproducible set of token sequences.

Text is tokenized document by document and packed, so that short documents are never thrown away and every sample has
exactly the length asked for. Samples that come as token ids are taken as they are. How the model is driven over the
samples is decided elsewhere; where named data comes from is in `hub.py`.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from auto_round.calibration.hub import (
    CalibrationDataError,
    CalibrationFileNotFoundError,
    MissingExtraError,
    Record,
    Source,
    builtin_source,
    list_records,
    open_source,
    parse_sources,
)
from auto_round.modeling.reading import reading

__all__ = [
    "CalibrationData",
    "CalibrationDataError",
    "CalibrationFileNotFoundError",
    "MissingExtraError",
    "build_calibration",
]

Sample = dict[str, torch.Tensor]

TEXT_FIELDS = ("text", "content", "code")
MESSAGE_FIELDS = ("messages", "conversations")
# The role names of ShareGPT-like records.
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


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
    """

    samples: tuple[Sample, ...]
    source: str
    tokens: int
    sha256: str
    notes: tuple[str, ...]
    held_out: tuple[Sample, ...] = ()


def build_calibration(
    dataset: Any,
    tokenizer: Any,
    *,
    seqlen: int = 2048,
    nsamples: int = 128,
    seed: int = 42,
    apply_chat_template: bool = False,
    system_prompt: str | None = None,
    holdout: int = 0,
) -> CalibrationData:
    """Make up to `nsamples` calibration samples of `seqlen` tokens.

    Args:
        dataset: None (the built-in text), a path or a string of names with options, a list of strings or records,
            or samples as they are: token-id lists, tensors [L] or [B, L], mappings of tensors, a data loader.
        tokenizer: a Transformers tokenizer; may be None when the samples come as token ids.
        seed: fixes the order in which documents are drawn.
        apply_chat_template: render every record with the tokenizer's chat template.
        system_prompt: opens every conversation that has no system message.
        holdout: how many samples to keep back in `held_out`. They are made of documents that `samples` does not use;
            where the data has none left, they are the last ones of `samples`, and a note says so.

    Raises:
        CalibrationDataError: the data is empty or malformed, or cannot be loaded.
        CalibrationFileNotFoundError: a file does not exist.
        MissingExtraError: a hub data set is named and `datasets` is not installed.
    """
    for name, value, least in (("seqlen", seqlen, 1), ("nsamples", nsamples, 1), ("holdout", holdout, 0)):
        if value < least:
            raise CalibrationDataError(f"{name} must be at least {least}, not {value}.")
    if dataset is None or isinstance(dataset, (str, os.PathLike)):
        sources = [builtin_source()] if dataset is None else parse_sources(os.fspath(dataset))
    elif _is_text_list(dataset):
        sources = [dataset]
    else:
        return _take_given(dataset, tokenizer, seqlen, nsamples, holdout)
    _check_tokenizer(sources, tokenizer, apply_chat_template, system_prompt)
    request = _Request(tokenizer, seqlen, nsamples, seed, apply_chat_template, system_prompt, holdout)
    return _pack_sources(sources, request)


# ---- text: records to token ids ----


@dataclass(frozen=True)
class _Request:
    """The arguments of `build_calibration` for data that has to be tokenized."""

    tokenizer: Any
    seqlen: int
    nsamples: int
    seed: int
    apply_chat_template: bool
    system_prompt: str | None
    holdout: int


def _is_text_list(dataset: Any) -> bool:
    if not isinstance(dataset, (list, tuple)):
        return False
    if not dataset:
        raise CalibrationDataError("The list of calibration data is empty; pass at least one text or sample.")
    first = dataset[0]
    if isinstance(first, Mapping):
        return not any(isinstance(value, (torch.Tensor, np.ndarray)) for value in (*first.values(), None)) and (
            "input_ids" not in first
        )
    return isinstance(first, str)


def _uses_template(source: Any, default: bool) -> bool:
    chosen = source.apply_chat_template if isinstance(source, Source) else None
    return default if chosen is None else chosen


def _check_tokenizer(sources: Sequence[Any], tokenizer: Any, template: bool, system_prompt: str | None) -> None:
    if tokenizer is None:
        raise CalibrationDataError(
            "Calibration text needs a tokenizer and none was given; pass `tokenizer`, or samples as token ids."
        )
    uses_template = any(_uses_template(source, template) for source in sources)
    if uses_template and not getattr(tokenizer, "chat_template", None):
        raise CalibrationDataError(
            "apply_chat_template was asked for and the tokenizer has no chat template; leave it out for a base model."
        )
    prompts = [system_prompt] + [source.system_prompt for source in sources if isinstance(source, Source)]
    if any(prompts) and not uses_template:
        raise CalibrationDataError("system_prompt has no effect without apply_chat_template; ask for both or neither.")


@dataclass(frozen=True)
class _Encoder:
    """Turns one record into the token ids that it contributes to the packed stream."""

    tokenizer: Any
    apply_chat_template: bool
    system_prompt: str | None

    def encode(self, where: str, record: Any) -> list[int]:
        """Token ids of a record, closed so that another may follow; empty when it holds no text."""
        if self.apply_chat_template:
            # A chat template writes its own begin and end marks, so none are added around it.
            return self._tokenize(where, self._render(where, record), add_special_tokens=False)
        ids = self._tokenize(where, _record_text(where, record), add_special_tokens=True)
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return [*ids, eos] if ids and eos is not None and ids[-1] != eos else ids

    def _tokenize(self, where: str, text: str, add_special_tokens: bool) -> list[int]:
        if not text.strip():
            return []
        # A tokenizer's expressions and tables come from a file, which may be damaged.
        with reading(f"the tokenizer, on {where},", "check the files of the tokenizer"):
            # verbose=False: documents longer than the model's context are expected here, they are cut when packed.
            return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _render(self, where: str, record: Any) -> str:
        messages = _record_messages(where, record)
        if messages and self.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False) if messages else ""
        except Exception as error:  # a template is a program of the checkpoint and may raise anything
            raise CalibrationDataError(
                f"{where}: the tokenizer's chat template refuses this conversation ({error}); "
                "check its roles or leave apply_chat_template out."
            ) from error


def _record_text(where: str, record: Any) -> str:
    text = record
    if isinstance(record, Mapping):
        field = next((name for name in TEXT_FIELDS if name in record), None)
        if field is None and any(name in record for name in (*MESSAGE_FIELDS, "prompt")):
            raise CalibrationDataError(f"{where} holds a conversation and no text; ask for apply_chat_template.")
        if field is None:
            raise CalibrationDataError(f'{where} has no "text" field; it has {", ".join(map(str, record)) or "none"}.')
        text = record[field]
    if not isinstance(text, str):
        raise CalibrationDataError(f"{where} holds a {type(text).__name__} where text is expected; give a string.")
    return text


def _record_messages(where: str, record: Any) -> list[dict[str, Any]]:
    """The conversation of a record; plain text becomes a user's message."""
    if isinstance(record, Mapping):
        field = next((name for name in MESSAGE_FIELDS if name in record), None)
        if field is not None:
            return normal_messages(where, record[field])
        if "prompt" in record and "response" in record:
            roles = {"user": record["prompt"], "assistant": record["response"]}
            return normal_messages(where, [{"role": role, "content": text} for role, text in roles.items()])
    text = _record_text(where, record)
    return [{"role": "user", "content": text}] if text.strip() else []


def normal_messages(where: str, messages: Any) -> list[dict[str, Any]]:
    """A conversation with the keys and role names of Transformers."""
    normal = []
    for message in messages if isinstance(messages, (list, tuple)) else [None]:
        role = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
        content = message.get("content", message.get("value")) if isinstance(message, Mapping) else None
        if not isinstance(role, str) or content is None:
            raise CalibrationDataError(f'{where} has a message without "role" and "content"; give both.')
        normal.append({**message, "role": ROLES.get(role, role), "content": content})
    return normal


# ---- text: token ids to samples ----


@dataclass
class _Draw:
    """Token ids drawn of one source: those to calibrate on, and those of later documents to keep back."""

    used: list[int]
    kept_back: list[int]


def _draw(documents: Iterable[list[int]], want: int, keep: int) -> _Draw:
    """Take `want` ids, then `keep` ids of documents that the first do not touch; stop reading as soon as possible."""
    draw = _Draw([], [])
    if not want and not keep:
        return draw
    for ids in documents:
        if len(draw.used) < want:
            draw.used.extend(ids[: want - len(draw.used)])  # the rest of this document is in neither part
        else:
            draw.kept_back.extend(ids[: keep - len(draw.kept_back)])
        if len(draw.used) >= want and len(draw.kept_back) >= keep:
            break
    return draw


def _shares(total: int, wishes: Sequence[int | None]) -> list[int]:
    """Divide `total` samples: a wish is met where it can be, the rest is spread evenly, the first get one more."""
    wished = sum(wish or 0 for wish in wishes)
    if wished > total:  # more was wished for than there is: in proportion
        ends = [sum(wish or 0 for wish in wishes[: i + 1]) * total // wished for i in range(len(wishes))]
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    even = [index for index, wish in enumerate(wishes) if wish is None]
    shares = [wish or 0 for wish in wishes]
    for position, index in enumerate(even):
        share, extra = divmod(total - wished, len(even))
        shares[index] = share + (position < extra)
    return shares


def _documents(source: Any, request: _Request) -> Iterator[list[int]]:
    system_prompt = request.system_prompt
    if isinstance(source, Source):
        records: Iterator[Record] = open_source(source, request.seed)
        system_prompt = system_prompt if source.system_prompt is None else source.system_prompt
    else:
        records = list_records(source, request.seed, "The list's record")
    encoder = _Encoder(request.tokenizer, _uses_template(source, request.apply_chat_template), system_prompt)
    return (encoder.encode(where, record) for where, record in records)


def _label(source: Any) -> str:
    if isinstance(source, Source):
        return source.label
    return f"list of {len(source)} {'strings' if isinstance(source[0], str) else 'records'}"


def _pack_sources(sources: Sequence[Any], request: _Request) -> CalibrationData:
    """Draw every source's share of tokens and cut the whole into samples."""
    seqlen, notes = request.seqlen, []
    label = " + ".join(_label(source) for source in sources)
    shares = _shares(request.nsamples, [getattr(source, "num", None) for source in sources])
    keeps = _shares(request.holdout, [None] * len(sources))
    whole: list[list[int]] = []
    tail: list[int] = []  # what does not fill a sample of its own source
    fresh: list[int] = []
    for source, share, keep in zip(sources, shares, keeps, strict=True):
        notes += _source_notes(source, share)
        draw = _draw(_documents(source, request), share * seqlen, keep * seqlen)
        pieces = _cut(draw.used, seqlen)
        tail += draw.used[len(pieces) * seqlen :]
        whole += pieces
        fresh += draw.kept_back
    asked = sum(shares)
    whole += _cut(tail, seqlen)[: asked - len(whole)]
    if not whole and not tail:
        raise CalibrationDataError(f"The calibration data ({label}) holds no text; give at least one document.")
    if not whole:
        whole, seqlen = [tail], len(tail)
        notes.append(f"the data gives {seqlen} tokens only, so the one sample has {seqlen} instead of {request.seqlen}")
    elif len(whole) < asked:
        notes.append(f"{len(whole)} samples of {seqlen} tokens could be made of the data; {asked} were asked for")
    if asked < request.nsamples:
        notes.append(f"num= limits the samples to {asked}; {request.nsamples} were asked for")
    samples = [_id_sample(ids) for ids in whole]
    return finish(samples, [_id_sample(ids) for ids in _cut(fresh, seqlen)], label, request.holdout, notes)


def _source_notes(source: Any, share: int) -> list[str]:
    notes = []
    if share == 0:
        notes.append(f"{_label(source)} gives no sample, since the others take all that were asked for")
    if isinstance(source, Source) and source.concat is False:
        notes.append(f"concat=false of {source.label} has no effect: documents are always packed")
    return notes


def _cut(ids: list[int], seqlen: int) -> list[list[int]]:
    """All the samples of exactly `seqlen` ids, in order; a rest is left over."""
    return [ids[start : start + seqlen] for start in range(0, len(ids) - seqlen + 1, seqlen)]


def _id_sample(ids: list[int]) -> Sample:
    return {"input_ids": torch.tensor([ids], dtype=torch.int64)}


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


# ---- samples that come as token ids ----


def _take_given(dataset: Any, tokenizer: Any, seqlen: int, nsamples: int, holdout: int) -> CalibrationData:
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


def is_token_sample(sample: Mapping[str, torch.Tensor]) -> bool:
    """Whether a sample is made of token ids [L] or [B, L], which can be counted, split and cut."""
    return "input_ids" in sample and sample["input_ids"].dim() < 3


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
