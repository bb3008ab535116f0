"""Calibration samples: from text, token ids or a data loader to a fixed, reproducible set of token sequences.

Text is tokenized document by document and packed, so that short documents are never thrown away and every sample has
exactly the length asked for. Samples that come as token ids are taken as they are, in `given.py`. How the model is
driven over the samples is decided elsewhere; where named data comes from is in `hub.py`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from auto_round.calibration.given import take_given
from auto_round.calibration.grammar import parse_sources
from auto_round.calibration.hub import (
    CalibrationDataError,
    CalibrationFileNotFoundError,
    MissingExtraError,
    Record,
    Source,
    builtin_source,
    list_records,
    open_source,
)
from auto_round.calibration.samples import CalibrationData, Sample, finish
from auto_round.modeling.reading import reading

__all__ = [
    "CalibrationData",
    "CalibrationDataError",
    "CalibrationFileNotFoundError",
    "MissingExtraError",
    "build_calibration",
]

OwnText = Callable[[bool | None, int], list[list[int]]]
"""Lets the model write so many tokens: (use its chat template or not, None for as it has one; tokens) → documents."""

TEXT_FIELDS = ("text", "content", "code")
MESSAGE_FIELDS = ("messages", "conversations")
# The role names of ShareGPT-like records.
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


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
    own_text: OwnText | None = None,
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
        own_text: writes the documents of the data set "self"; None where there is no model to write them.

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
        return take_given(dataset, tokenizer, seqlen, nsamples, holdout)
    _check_tokenizer(sources, tokenizer, apply_chat_template, system_prompt)
    request = _Request(tokenizer, seqlen, nsamples, seed, apply_chat_template, system_prompt, holdout, own_text)
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
    own_text: OwnText | None = None


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
    """Token ids drawn of one source: those to calibrate on, of so many documents, and those of later ones to keep."""

    used: list[int]
    kept_back: list[int]
    documents: int = 0


def _draw(documents: Iterable[list[int]], want: int, keep: int) -> _Draw:
    """Take `want` ids, then `keep` ids of documents that the first do not touch; stop reading as soon as possible."""
    draw = _Draw([], [])
    if not want and not keep:
        return draw
    for ids in documents:
        if len(draw.used) < want:
            draw.used.extend(ids[: want - len(draw.used)])  # the rest of this document is in neither part
            draw.documents += bool(ids)
        else:
            draw.kept_back.extend(ids[: keep - len(draw.kept_back)])
        if len(draw.used) >= want and len(draw.kept_back) >= keep:
            break
    return draw


def _shares(total: int, wishes: Sequence[int | None], weights: Sequence[float | None] | None = None) -> list[int]:
    """Divide `total` samples: a wish is met where it can be, the rest is spread by weight, the first get one more.

    weights: 1 for those that have none.
    """
    wished = sum(wish or 0 for wish in wishes)
    if wished > total:  # more was wished for than there is: in proportion
        ends = [sum(wish or 0 for wish in wishes[: i + 1]) * total // wished for i in range(len(wishes))]
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    open_ones = [index for index, wish in enumerate(wishes) if wish is None]
    weight = {index: (weights[index] if weights else None) or 1.0 for index in open_ones}
    exact = {index: (total - wished) * weight[index] / sum(weight.values()) for index in open_ones}
    shares = [wish or 0 for wish in wishes]
    for index in open_ones:
        shares[index] = int(exact[index])
    left = total - sum(shares) if open_ones else 0
    for index in sorted(open_ones, key=lambda one: int(exact[one]) - exact[one])[:left]:
        shares[index] += 1
    return shares


def _documents(source: Any, request: _Request, tokens: int) -> Iterator[list[int]]:
    """Documents of a source, of which so many tokens are wanted; most are read no sooner than they are asked for."""
    system_prompt = request.system_prompt
    if isinstance(source, Source) and source.is_self:
        return iter(_own_documents(source, request, tokens))
    if isinstance(source, Source):
        records: Iterator[Record] = open_source(source, request.seed)
        system_prompt = system_prompt if source.system_prompt is None else source.system_prompt
    else:
        records = list_records(source, request.seed, "The list's record")
    encoder = _Encoder(request.tokenizer, _uses_template(source, request.apply_chat_template), system_prompt)
    return (encoder.encode(where, record) for where, record in records)


def _own_documents(source: Source, request: _Request, tokens: int) -> list[list[int]]:
    if request.own_text is None:
        raise CalibrationDataError(
            'The data set "self" is text that the model itself writes, and there is no model here to write it: '
            "name another data set."
        )
    if source.system_prompt is not None:
        raise CalibrationDataError("system_prompt does not apply to the text that the model writes; remove it.")
    return request.own_text(source.apply_chat_template, tokens) if tokens else []


def _label(source: Any) -> str:
    if isinstance(source, Source):
        return source.label
    return f"list of {len(source)} {'strings' if isinstance(source[0], str) else 'records'}"


def _pack_sources(sources: Sequence[Any], request: _Request) -> CalibrationData:
    """Draw every source's share of tokens and cut the whole into samples."""
    seqlen, notes = request.seqlen, []
    label = " + ".join(_label(source) for source in sources)
    wishes, weights = ([getattr(source, key, None) for source in sources] for key in ("num", "weight"))
    shares = _shares(request.nsamples, wishes, weights)
    keeps = _shares(request.holdout, [None] * len(sources))
    whole: list[list[int]] = []
    tail: list[int] = []  # what does not fill a sample of its own source
    fresh: list[int] = []
    documents = 0
    for source, share, keep in zip(sources, shares, keeps, strict=True):
        notes += _source_notes(source, share)
        want, spare = share * seqlen, keep * seqlen
        draw = _draw(_documents(source, request, want + spare), want, spare)
        documents += draw.documents
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
    found = finish(samples, [_id_sample(ids) for ids in _cut(fresh, seqlen)], label, request.holdout, notes)
    return dataclasses.replace(found, documents=documents)


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
