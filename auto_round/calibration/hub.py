"""Names of calibration data, turned into records.

A `Source` is a local .json, .jsonl or .txt file, a data set of the Hugging Face hub, the text that comes with the
package, or text that the model writes (`self_text.py`). This file finds the documents and yields them in the seeded
order in which they shall be used, each with the words an error message needs to point at it. What a record means, and
what tokens it gives, is decided in `data.py`; how people name sources, in `grammar.py`.
"""

import json
import random
import re
from array import array
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Record = tuple[str, Any]  # where it stands ("data.jsonl line 3"), and the string or mapping found there
T = TypeVar("T")

FILE_TYPES = (".json", ".jsonl", ".txt")
DOCUMENT_LINE = "<|doc|>"
BUILTIN, SELF = "builtin", "self"
BUILTIN_FILE = Path(__file__).resolve().parent.parent / "assets" / "calibration.jsonl"
WAY_OUT = "leave `dataset` out to use the built-in text, or give a local .json, .jsonl or .txt file"

_CHECKED_BYTES = 64 * 2**20  # files up to this size are parsed in full before use, so a bad line never hides
_SHUFFLE_BUFFER = 10_000
# Quotes inside a JSON string are escaped, so this can only match a key, never a piece of a document.
_KIND = re.compile(rb'"kind"\s*:\s*"((?:[^"\\]|\\.)*)"')


class CalibrationDataError(ValueError):
    """The calibration data cannot be used as given."""


class CalibrationFileNotFoundError(FileNotFoundError):
    """A file of calibration data does not exist."""


class MissingExtraError(ValueError):
    """An optional library is needed and not installed."""


@dataclass(frozen=True)
class Source:
    """One named source of documents; options that were not given are None."""

    name: str
    label: str
    is_file: bool
    splits: tuple[str, ...] = ()
    num: int | None = None
    weight: float | None = None
    concat: bool | None = None
    apply_chat_template: bool | None = None
    system_prompt: str | None = None

    @property
    def is_self(self) -> bool:
        """Whether the model writes the text."""
        return self.name == SELF


@dataclass(frozen=True)
class HubDataset:
    """Where a known hub data set keeps its text: one field, or a (prompt, response) pair of fields."""

    repo: str
    config: str | None = None
    splits: tuple[str, ...] = ("train",)
    field: str | None = None
    pair: tuple[str, str] | None = None


HUB_DATASETS: dict[str, HubDataset] = {
    "NeelNanda/pile-10k": HubDataset("NeelNanda/pile-10k"),
    # The same text is on both hubs; taking it from this one spares a dependency on modelscope.
    "swift/pile-val-backup": HubDataset("mit-han-lab/pile-val-backup", splits=("validation",)),
    "BAAI/CCI3-HQ": HubDataset("BAAI/CCI3-HQ"),
    "codeparrot/github-code-clean": HubDataset("codeparrot/github-code-clean", field="code"),
    "nvidia/OpenCodeInstruct": HubDataset("nvidia/OpenCodeInstruct", pair=("input", "output")),
    "HuggingFaceH4/ultrachat_200k": HubDataset("HuggingFaceH4/ultrachat_200k", splits=("train_sft",)),
    "openbmb/Ultra-FineWeb": HubDataset("openbmb/Ultra-FineWeb", splits=("en", "zh"), field="content"),
    "madao33/new-title-chinese": HubDataset("madao33/new-title-chinese", field="content"),
    "google-research-datasets/mbpp": HubDataset("google-research-datasets/mbpp", pair=("text", "code")),
    "d0rj/audiocaps": HubDataset("d0rj/audiocaps", field="caption"),
    "HuggingFaceFW/fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", config="sample-10BT"),
}


def builtin_source() -> Source:
    """The text that comes with the package."""
    if not BUILTIN_FILE.is_file():
        raise CalibrationFileNotFoundError(
            f"The built-in calibration text {BUILTIN_FILE} is missing from this installation; "
            "reinstall the package or pass `dataset`."
        )
    return Source(str(BUILTIN_FILE), "built-in text", is_file=True)


# ---- drawing ----


def round_robin(iterables: Iterable[Iterable[T]]) -> Iterator[T]:
    """One item of each in turn; those that run out drop from the round."""
    queue = deque(iter(iterable) for iterable in iterables)
    while queue:
        iterator = queue.popleft()
        for item in iterator:
            yield item
            queue.append(iterator)
            break


def draw_order(kinds: Iterable[Hashable], seed: int) -> list[int]:
    """The order in which records are used: shuffled within a kind, the kinds in turn.

    With a single kind this is `random.Random(seed).shuffle` of the indices.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(index)
    rng = random.Random(seed)
    for group in groups.values():
        rng.shuffle(group)
    return list(round_robin(groups.values()))


def open_source(source: Source, seed: int) -> Iterator[Record]:
    """Yield the records of a source in drawing order, reading no more of them than are asked for."""
    if not source.is_file:
        return _guarded(hub_records(source, seed), source)
    if source.splits:
        raise CalibrationDataError(f"Option split= does not apply to the local file {source.name}; remove it.")
    readers = {".json": json_records, ".jsonl": jsonl_records, ".txt": txt_records}
    return readers[Path(source.name).suffix.lower()](Path(source.name), seed)


# ---- local files ----


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CalibrationDataError(
            f"{where} is not UTF-8 text (byte {error.start} of it: {error.reason}); convert the file to UTF-8."
        ) from error


def _parse_line(raw: bytes, where: str) -> Any:
    try:
        return _parse(raw, where)
    except json.JSONDecodeError as error:
        raise CalibrationDataError(
            f"{where} is not valid JSON ({error.msg} at column {error.colno}); a .jsonl file needs one record per line."
        ) from error


def _parse(raw: bytes, where: str) -> Any:
    """JSON; a JSONDecodeError is left to those who know what the file should have been."""
    text = _decode(raw, where)
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or a thousand brackets
        raise CalibrationDataError(f"{where} cannot be read ({error}); give records of text.") from error


def jsonl_records(path: Path, seed: int) -> Iterator[Record]:
    """Records of a .jsonl file, drawn from all of it by line offsets; only the drawn lines stay in memory."""
    offsets, numbers, kinds, names = array("Q"), array("Q"), array("L"), {}
    check, position = path.stat().st_size <= _CHECKED_BYTES, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                if check:
                    _parse_line(line, f"{path} line {number}")
                match = _KIND.search(line)
                kinds.append(names.setdefault(match and match.group(1), len(names)))
                offsets.append(position)
                numbers.append(number)
            position += len(line)
        for index in draw_order(kinds, seed):
            file.seek(offsets[index])
            where = f"{path} line {numbers[index]}"
            yield where, _parse_line(file.readline(), where)


def json_records(path: Path, seed: int) -> Iterator[Record]:
    """Records of a .json file: a list of records or strings, one record, or columns like {"text": [...]}."""
    try:
        data = _parse(path.read_bytes(), str(path))
    except json.JSONDecodeError as error:
        raise CalibrationDataError(
            f"{path} line {error.lineno} is not valid JSON ({error.msg}); "
            "if the file has one record per line, name it .jsonl."
        ) from error
    if isinstance(data, dict):
        data = data["text"] if isinstance(data.get("text"), list) else [data]
    if not isinstance(data, list):
        raise CalibrationDataError(f'{path} holds a {type(data).__name__}; give a list of records or {{"text": […]}}.')
    yield from list_records(data, seed, f"{path} record")


def list_records(records: list[Any] | tuple[Any, ...], seed: int, where: str) -> Iterator[Record]:
    """Records of a list, in drawing order, by the `kind` of those that carry one."""
    kinds = (str(r.get("kind")) if isinstance(r, dict) else None for r in records)
    for index in draw_order(kinds, seed):
        yield f"{where} {index + 1}", records[index]


def txt_records(path: Path, seed: int) -> Iterator[Record]:
    """Documents of a .txt file, drawn from all of it; each is read when its turn comes."""
    spans = _document_spans(path)
    with path.open("rb") as file:
        for index in draw_order((None for _ in spans), seed):
            start, end, number = spans[index]
            file.seek(start)
            where = f"The document at line {number} of {path}"
            yield where, _decode(file.read(end - start), where).strip("\r\n")


def _document_spans(path: Path) -> list[tuple[int, int, int]]:
    """(first byte, end, line number) of every document.

    Lines `<|doc|>` separate documents where there are any, since those may hold blank lines; else blank lines do.
    """
    marked: list[tuple[int, int, int]] = []
    paragraphs: list[tuple[int, int, int]] = []
    has_marker, position, document, paragraph = False, 0, None, None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.strip()
            is_marker = text == DOCUMENT_LINE.encode()
            has_marker |= is_marker
            if paragraph and (is_marker or not text):
                paragraphs.append((paragraph[0], position, paragraph[1]))
                paragraph = None
            if document and is_marker:
                marked.append((document[0], position, document[1]))
                document = None
            if text and not is_marker:
                paragraph = paragraph or (position, number)
                document = document or (position, number)
            position += len(line)
    if paragraph:
        paragraphs.append((paragraph[0], position, paragraph[1]))
    if document:
        marked.append((document[0], position, document[1]))
    return marked if has_marker else paragraphs


# ---- the hub ----


def find_hub_dataset(name: str) -> HubDataset:
    """The row of a known data set by its name or a part of it; any other name is taken as it is."""
    if name in HUB_DATASETS:
        return HUB_DATASETS[name]
    matches = [key for key in HUB_DATASETS if "/" not in name and name.lower() in key.lower()]
    if len(matches) > 1:
        raise CalibrationDataError(f"The data set name {name!r} fits {' and '.join(matches)}; write it in full.")
    return HUB_DATASETS[matches[0]] if matches else HubDataset(name)


def hub_records(source: Source, seed: int) -> Iterator[Record]:
    """Stream the records of a hub data set (or a folder that `datasets` understands), its splits in turn."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"The calibration data set {source.name!r} needs the `datasets` library: "
            f'pip install "auto-round[datasets]"; or {WAY_OUT}.'
        ) from error
    row = HubDataset(source.name) if Path(source.name).is_dir() else find_hub_dataset(source.name)
    streams = [
        datasets.load_dataset(row.repo, row.config, split=split, streaming=True).shuffle(
            seed=seed, buffer_size=_SHUFFLE_BUFFER
        )
        for split in source.splits or row.splits
    ]
    for index, example in enumerate(round_robin(streams)):
        where = f"Record {index + 1} of {source.label}"
        yield where, _hub_record(row, example, where)


def _hub_record(row: HubDataset, example: dict[str, Any], where: str) -> Any:
    missing = [key for key in (row.pair or (row.field,)) if key is not None and key not in example]
    if missing:
        raise CalibrationDataError(f"{where} has no field {missing[0]!r}; it has {', '.join(example)}.")
    if row.pair:
        prompt, response = (str(example[key]) for key in row.pair)
        return {"prompt": prompt, "response": response, "text": f"{prompt}\n\n{response}"}
    return {"text": example[row.field]} if row.field else example


def _guarded(records: Iterator[Record], source: Source) -> Iterator[Record]:
    """Name the data set and the way out in whatever the hub, the network or a file format raises."""
    try:
        yield from records
    except (CalibrationDataError, MissingExtraError):
        raise
    except Exception as error:  # `datasets` raises a dozen unrelated types, some of its HTTP library
        reason = short(f"{type(error).__name__}: {error}")
        raise CalibrationDataError(
            f"The calibration data set {source.name!r} could not be loaded from the hub ({reason}); "
            f"check the name, its split and the network, or {WAY_OUT}."
        ) from error


def short(text: str, length: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."
