"""What a multimodal model is given: images, audio and text, prepared by the model's own processor.

A record (LLaVA's layout, the chat format of Transformers, or an image beside a text) becomes a conversation, and the
processor makes of it what the model's forward takes. A sample is never cut inside an image: one that is too long
loses text behind its last image, or is left out. Records that cannot be used are counted, and the notes say why.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from auto_round.calibration.given import as_batch, split_batch
from auto_round.calibration.grammar import parse_sources
from auto_round.calibration.hub import (
    CalibrationDataError,
    Record,
    Source,
    draw_order,
    json_records,
    open_source,
    round_robin,
)
from auto_round.calibration.media import (
    KINDS,
    Message,
    Places,
    SkipError,
    conversation,
    listed,
    missing_extra,
    with_media,
)
from auto_round.calibration.processors import forms_of, load_processor, media_token_ids, tensors_of
from auto_round.calibration.samples import CalibrationData, Sample, finish

__all__ = ["build_multimodal", "is_multimodal_dataset", "load_processor"]

LLAVA_REPO = "liuhaotian/LLaVA-Instruct-150K"
LLAVA_FILES = {
    "liuhaotian/llava": "llava_instruct_150k.json",
    "liuhaotian/llava_conv_58k": "conversation_58k.json",
    "liuhaotian/llava_instruct_80k": "llava_instruct_80k.json",
    "liuhaotian/llava_instruct_150k": "llava_instruct_150k.json",
}
LLAVA_IMAGES = "http://images.cocodataset.org/train2017/"  # where those data sets' images come from

_TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids", "labels"}
_TOKEN_DIM = {"cross_attention_mask": 1}  # where it is not the last
_RAW_KEYS = {"text", "messages", "conversations", *KINDS, *(f"{kind}s" for kind in KINDS)}
_READY = re.compile(r"pixel|image|audio|video|input_features|input_values")
# Keys of JSON records that lead to images or audio; inside a JSON string the quotes would be escaped.
_JSON_MEDIA = re.compile(rb'"(?:image|audio)s?"\s*:\s*(?:"[^"]|\[\s*["{])|"type"\s*:\s*"(?:image|audio)')
_PEEK_BYTES, _PEEK_RECORDS = 1 << 20, 16
_GIVE_UP, _GIVE_UP_SITE = 200, 8  # records in a row at the start that are of no use; where each asks a network


# ---- what a data set asks for ----


def is_multimodal_dataset(dataset: Any) -> bool:
    """Whether a data set holds images or audio; looks at its name, or at the first of its records.

    A data loader or an iterator is not touched, and counts as text.
    """
    if isinstance(dataset, (str, os.PathLike)):
        return any(_has_media(source) for source in parse_sources(os.fspath(dataset)))
    if isinstance(dataset, Mapping):
        return _is_media_record(dataset)
    if not _is_sequence(dataset):
        return False
    return any(_is_media_record(dataset[index]) for index in range(min(len(dataset), _PEEK_RECORDS)))


def _is_sequence(dataset: Any) -> bool:
    others = isinstance(dataset, (str, torch.Tensor, np.ndarray, Mapping))
    return not others and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def _has_media(source: Source) -> bool:
    if not source.is_file:
        return _llava_file(source.name) is not None
    if Path(source.name).suffix.lower() == ".txt":
        return False
    with open(source.name, "rb") as file:
        return _JSON_MEDIA.search(file.read(_PEEK_BYTES)) is not None


def _llava_file(name: str) -> str | None:
    return LLAVA_FILES.get(name.lower(), LLAVA_FILES.get(f"liuhaotian/{name.lower()}"))


def _is_ready(record: Any) -> bool:
    """Whether a record is made of tensors as a model takes them."""
    if not isinstance(record, Mapping):
        return isinstance(record, torch.Tensor)
    tensors = any(isinstance(value, (torch.Tensor, np.ndarray)) for value in record.values())
    return "input_ids" in record or (tensors and not _RAW_KEYS & record.keys())


def _is_media_record(record: Any) -> bool:
    if not isinstance(record, Mapping):
        return False
    if _is_ready(record):
        return any(_READY.search(str(key)) for key in record)
    if any(listed(record, kind) for kind in KINDS):
        return True
    messages = record.get("messages") or record.get("conversations") or ()
    parts = (message.get("content") for message in messages if isinstance(message, Mapping))
    lists = (content for content in parts if isinstance(content, (list, tuple)))
    return any(isinstance(p, Mapping) and str(p.get("type")).startswith(KINDS) for p in chain.from_iterable(lists))


# ---- the data ----


def build_multimodal(
    dataset: Any,
    processor: Any,
    *,
    seqlen: int,
    nsamples: int,
    seed: int,
    holdout: int = 0,
    extra_data_dir: str | os.PathLike[str] | None = None,
    template: str | os.PathLike[str] | None = None,
) -> CalibrationData:
    """Make up to `nsamples` calibration samples of images, audio and text.

    Args:
        dataset: a .json or .jsonl file in LLaVA's layout, one of the names in `LLAVA_FILES` (with options, as
            `build_calibration` takes them), a list of records {"messages": …}, {"image": …, "text": …},
            {"audio": …, "text": …}, or samples as the model takes them, which are used as they are, in their order.
        processor: the model's processor; may be None for samples that are ready.
        seqlen: most tokens of a sample, those that stand for images among them.
        seed: fixes the order in which records are drawn.
        holdout: how many samples of further records to keep back in `held_out`.
        extra_data_dir: where images and audio files are, or "image=folder,audio=folder"; else beside the file.
        template: a chat template to use instead of the processor's: a Jinja file, or its text.

    Returns:
        Samples of what the processor makes: "input_ids" int64 [1, L], "attention_mask" [1, L], and the tensors of
        the images and audio, such as "pixel_values" [images, channels, height, width], as the model's forward takes
        them.

    Raises:
        CalibrationDataError: no record can be used, or the data cannot be loaded; the message says why.
        MissingExtraError: a library that images or audio need is not installed.
    """
    dataset = [dataset] if isinstance(dataset, Mapping) else dataset
    streams = _open_streams(dataset, seed, _folders(extra_data_dir))
    maker = _Maker(processor, seqlen, template)
    limits = [stream.num for stream in streams]
    asked = nsamples if None in limits else min(nsamples, sum(limits))
    drawn = (islice(maker.samples(stream), None if stream.num is None else stream.num + holdout) for stream in streams)
    taken = list(islice(round_robin(drawn), asked + holdout))
    label = " + ".join(stream.label for stream in streams)
    if not taken:
        why = "; ".join(maker.notes()) or "it holds no records"
        raise CalibrationDataError(f"No sample could be made of the calibration data ({label}): {why}.")
    notes = maker.notes()
    if len(taken) < nsamples:
        notes.append(f"{min(len(taken), asked)} samples could be made of the data; {nsamples} were asked for")
    return finish(taken[:asked], taken[asked:], label, holdout, notes)


@dataclass(frozen=True)
class _Stream:
    """Records in drawing order, and where the files are that they name; num: most samples of them."""

    label: str
    records: Iterator[Record]
    places: Places
    num: int | None = None


def _folders(extra: str | os.PathLike[str] | None) -> dict[str, list[Path]]:
    """{"image": [folder], "audio": [folder]} of "folder" or of "image=folder,audio=folder"."""
    if extra is None:
        return {kind: [] for kind in KINDS}
    parts = [part.partition("=") for part in os.fspath(extra).split(",")]
    named = {kind.strip(): Path(path.strip()).expanduser() for kind, sep, path in parts if sep and kind.strip()}
    if os.path.isdir(extra) or not named:
        named = {kind: Path(extra).expanduser() for kind in KINDS}
    for path in named.values():
        if not path.is_dir():
            raise CalibrationDataError(f"extra_data_dir: there is no folder {path}; give the folder of the images.")
    return {kind: [named[kind]] if kind in named else [] for kind in KINDS}


def _open_streams(dataset: Any, seed: int, folders: dict[str, list[Path]]) -> list[_Stream]:
    if isinstance(dataset, (str, os.PathLike)):
        return [_open_named(source, seed, folders) for source in parse_sources(os.fspath(dataset))]
    if not _is_sequence(dataset):
        raise CalibrationDataError(f"Records of images and text come in a list, not in a {type(dataset).__name__}.")
    ready = len(dataset) and _is_ready(dataset[0])
    order = range(len(dataset)) if ready else draw_order((None for _ in range(len(dataset))), seed)
    records = ((f"The list's record {index + 1}", dataset[index]) for index in order)
    here = {kind: [*paths, Path()] for kind, paths in folders.items()}
    return [_Stream(f"list of {len(dataset)} {'samples' if ready else 'records'}", records, Places(here))]


def _open_named(source: Source, seed: int, folders: dict[str, list[Path]]) -> _Stream:
    name = _llava_file(source.name)
    if source.is_file or name is None:
        beside = Path(source.name).parent
        places = {kind: [*paths, beside, Path()] for kind, paths in folders.items()}
        return _Stream(source.label, open_source(source, seed), Places(places), source.num)
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(LLAVA_REPO, name, repo_type="dataset")
    except Exception as error:  # the hub's library raises a dozen unrelated types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CalibrationDataError(
            f"The calibration data set {source.name!r} could not be loaded from the hub ({reason}); check the network, "
            f"or give the path of a copy of {name} as `dataset`, and the folder of its images as `extra_data_dir`."
        ) from error
    site = None if folders["image"] else LLAVA_IMAGES
    return _Stream(f"hub {LLAVA_REPO}/{name}", json_records(Path(path), seed), Places(folders, site), source.num)


# ---- records to samples ----


@dataclass
class _Maker:
    """Makes samples of records, and keeps account of those that are of no use.

    way: what its samples hold beside text. All hold the same, so that all take the same way through the model.
    """

    processor: Any
    seqlen: int
    template: Any = None
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    cut: int = 0
    way: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.media_ids = media_token_ids(self.processor)
        self._forms: list[Any] = []

    def notes(self) -> list[str]:
        """What a person should know about the records that were read."""
        notes = [
            f"{count} records were left out, since {why} (first: {first})"
            for why, (count, first) in sorted(self.skipped.items())
        ]
        if self.cut:
            notes.append(f"{self.cut} samples were longer than {self.seqlen} tokens and lost text after their images")
        return notes

    def samples(self, stream: _Stream) -> Iterator[Sample]:
        """The samples of a stream's records; stops where the first ones are all of no use."""
        made = failed = 0
        most = _GIVE_UP if stream.places.site is None else _GIVE_UP_SITE
        for where, record in stream.records:
            try:
                for sample in self._samples_of(where, record, stream):
                    self._check_way(sample)
                    made += 1
                    yield sample
            except SkipError as skip:
                failed += 1
                why, details = skip.args
                count, first = self.skipped.get(why, (0, f"{where}: {details}"))
                self.skipped[why] = (count + 1, first)
            if failed >= most and not made:
                return

    def _check_way(self, sample: Sample) -> None:
        way = frozenset(sample.keys() - _TEXT_KEYS)
        self.way = self.way or way
        if not way or way != self.way:
            held, others = (" and ".join(sorted(keys)) for keys in (way or {"text alone"}, self.way or {"images"}))
            raise SkipError(f"they hold {held} where the others hold {others}", "a model takes another way for them")

    def _samples_of(self, where: str, record: Any, stream: _Stream) -> list[Sample]:
        if _is_ready(record):
            return [self._fit(sample) for sample in split_batch(as_batch(record, where), where)]
        if self.processor is None:
            raise CalibrationDataError(
                "Images and audio need the model's processor, and none was given: pass `processor`, or put its files "
                "(processor_config.json, preprocessor_config.json) into the model's folder."
            )
        return [self._fit(self._process(with_media(conversation(where, record), self.processor, stream.places)))]

    def _process(self, messages: list[Message]) -> Sample:
        """The processor's tensors of a conversation, in the first form of it that the processor takes."""
        self._forms = self._forms or forms_of(self.processor, self.template)
        kinds = {part["type"] for message in messages for part in message["content"]} - {"text"}
        problems = []
        for form in list(self._forms):
            try:
                sample = tensors_of(form(self.processor, messages))
            except ImportError as error:
                raise missing_extra(error, kinds) from error
            except Exception as error:  # a template and a processor are programs of the checkpoint
                problems.append(" ".join(f"{type(error).__name__}: {error}".split())[:300])
                continue
            problem = self._missing(sample, kinds)
            if problem is None:
                self._forms.sort(key=lambda other, best=form: other is not best)
                return sample
            problems.append(problem)
        raise SkipError("the processor cannot use them", "; or ".join(dict.fromkeys(problems)))

    def _missing(self, sample: Sample, kinds: set[str]) -> str | None:
        """Why a conversation's images would not reach the model; None if they do."""
        if kinds and not sample.keys() - _TEXT_KEYS:
            return f"{type(self.processor).__name__} makes nothing of the {' and '.join(sorted(kinds))}"
        ids = sample.get("input_ids")
        if kinds and self.media_ids and ids is not None and not _is_in(ids, self.media_ids).any():
            return "the chat template leaves no place for the image or audio in the text"
        return None

    def _fit(self, sample: Sample) -> Sample:
        """The sample, without text that would make it too long; token ids [1, L], L at most `seqlen`."""
        ids = sample.get("input_ids")
        if ids is None or ids.dim() != 2 or ids.shape[1] <= self.seqlen:
            return sample
        length = ids.shape[1]
        places = _is_in(ids, self.media_ids) | (sample.get("mm_token_type_ids", torch.zeros_like(ids)) != 0)
        last = int(places.nonzero()[-1, 1]) if places.any() else -1
        unknown = last < 0 and bool(sample.keys() - _TEXT_KEYS)
        unsure = any(length in value.shape and not _follows(key, value, length) for key, value in sample.items())
        if last >= self.seqlen or unknown or unsure:
            needs = length if unknown or unsure else last + 1
            raise SkipError(
                f"they need more than {self.seqlen} tokens with their images: raise seqlen or shrink them",
                f"{needs} tokens",
            )
        self.cut += 1
        cut = {key: value for key, value in sample.items() if _follows(key, value, length)}
        return sample | {key: value.narrow(_TOKEN_DIM.get(key, -1), 0, self.seqlen) for key, value in cut.items()}


def _follows(key: str, value: torch.Tensor, length: int) -> bool:
    """Whether a tensor has an entry for each of the text's tokens, in one dimension that is known."""
    known = key in _TEXT_KEYS or key in _TOKEN_DIM
    return known and value.shape[_TOKEN_DIM.get(key, -1)] == length and list(value.shape).count(length) == 1


def _is_in(ids: torch.Tensor, wanted: frozenset[int]) -> torch.Tensor:
    return torch.isin(ids, torch.tensor(sorted(wanted), dtype=ids.dtype))
