"""A checkpoint directory as a source of tensors: names, shapes and dtypes from the headers alone, bytes on demand.

A `DequantizedCheckpoint` is one whose weights are stored as codes and scales and shown as floats; which formats there
are, and how they decode, is `auto_round.modeling.sources`' business.

Only safetensors are read; pickled weights are refused, since unpickling runs code. Headers are checked against file
sizes before anything is trusted, so that a truncated shard is reported by name and not as a crash hours later.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from auto_round.modeling.reading import CheckpointError, read_json, stays_inside

__all__ = ["Checkpoint", "CheckpointError", "DequantizedCheckpoint", "TensorEntry", "read_header"]

MAX_HEADER = 100_000_000  # the limit of the safetensors specification
MAX_OFFSET = 1 << 62  # what 64-bit sizes can be added up to
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "BOOL": torch.bool,
}


SAMPLE = 256  # bytes, at two places of each tensor, that tell whether it is still the same
_CHANGED = "put the model's files back, or start again with the new ones; blocks finished before are kept"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: shard, shape, dtype and its bytes within the shard."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Checkpoint:
    """The tensors of a model directory by name; reads headers on construction and bytes when asked.

    headers_only: files may end after their headers; then no tensor can be read.

    Raises:
        CheckpointError: no safetensors, a shard that is missing or truncated, or a header that lies.
    """

    def __init__(self, directory: str | Path, headers_only: bool = False):
        self.directory = Path(directory)
        self.entries: dict[str, TensorEntry] = {}
        self._seen: dict[TensorEntry, bytes] = {}  # a few bytes of each tensor, as they were when it was first read
        for file in _shards(self.directory):
            for name, entry in read_header(file, headers_only).items():
                if name in self.entries:
                    other = self.entries[name].file.name
                    raise CheckpointError(f"{self.directory}: tensor {name!r} is in both {other} and {file.name}")
                self.entries[name] = entry

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def names(self) -> Iterable[str]:
        return self.entries.keys()

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by name. Each shard is mapped anew, so its pages are given back when the tensors are dropped."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].file, []).append(name)
        tensors = {}
        for file, wanted in by_file.items():
            self._check_unchanged(file, [self.entries[name] for name in wanted])
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in wanted:
                        tensors[name] = handle.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read any more ({error}): {_CHANGED}") from error
        return tensors

    def read_one(self, name: str) -> torch.Tensor:
        return self.read([name])[name]

    def _check_unchanged(self, file: Path, entries: Iterable[TensorEntry]) -> list[bytes]:
        """A few bytes of each tensor of a file, which must be those that were there before.

        Raises:
            CheckpointError: they are not; names the file.
        """
        samples = []
        try:
            with open(file, "rb", buffering=0) as handle:
                for entry in entries:
                    places = (entry.begin + max(0, entry.nbytes - SAMPLE) * part // 3 for part in (1, 2))
                    read = [os.pread(handle.fileno(), min(SAMPLE, entry.nbytes), place) for place in places]
                    samples.append(hashlib.blake2b(b"".join(read), digest_size=16).digest())
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read any more ({error}): {_CHANGED}") from error
        for entry, sample in zip(entries, samples, strict=True):
            if self._seen.setdefault(entry, sample) != sample:
                raise CheckpointError(f"{file} changed while it was read: {_CHANGED}")
        return samples

    def fingerprint(self) -> str:
        """Hash of what identifies the weights without reading them all: names, layout, and bytes of every tensor."""
        digest = hashlib.sha256()
        by_file: dict[Path, list[tuple[str, TensorEntry]]] = {}
        for name, entry in sorted(self.entries.items()):
            by_file.setdefault(entry.file, []).append((name, entry))
        for file, found in sorted(by_file.items()):
            samples = self._check_unchanged(file, [entry for _, entry in found])
            for (name, entry), sample in zip(found, samples, strict=True):
                digest.update(f"{file.name}:{name}:{entry.shape}:{entry.dtype}:{entry.begin}".encode() + sample)
        return digest.hexdigest()


class Decodable(Protocol):
    """A float tensor that is stored in parts: role → stored tensor, "codes" being the one it is found by."""

    name: str
    parts: Mapping[str, str]

    @property
    def float_shape(self) -> tuple[int, ...]: ...

    def decode(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor: ...


@dataclass(frozen=True)
class VirtualEntry(TensorEntry):
    """A dequantized tensor: its float shape and dtype, and where its codes lie."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class DequantizedCheckpoint(Checkpoint):
    """A quantized checkpoint, showing the float model that it stands for.

    Attributes:
        source: the checkpoint as it is stored.
        weights: float name → how it is stored, for every dequantized tensor.
        dropped: stored tensor that is not shown → why. Every stored tensor is shown or here.
        dtype: what is dequantized to.

    Raises:
        CheckpointError: a tensor that is stored both quantized and as floats.
    """

    def __init__(
        self, source: Checkpoint, weights: Mapping[str, Decodable], dropped: Mapping[str, str], dtype: torch.dtype
    ):
        self.source, self.directory = source, source.directory
        self.weights, self.dropped, self.dtype = dict(weights), dict(dropped), dtype
        self.entries: dict[str, TensorEntry] = {}
        codes = {weight.parts["codes"]: weight for weight in self.weights.values()}
        for name, entry in source.entries.items():
            if name in codes:
                weight = codes[name]
                if weight.name != name and weight.name in source:
                    raise CheckpointError(f"{self.directory}: {weight.name!r} is stored twice, quantized and as floats")
                shown = VirtualEntry(entry.file, weight.float_shape, dtype, entry.begin, entry.end)
                self.entries[weight.name] = shown
            elif name not in self.dropped:
                self.entries[name] = entry

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by name; the codes of one weight at a time are mapped beside them."""
        names = list(names)
        stored = self.source.read([name for name in names if name not in self.weights])
        return {name: self._decode(self.weights[name]) if name in self.weights else stored[name] for name in names}

    def _decode(self, weight: Decodable) -> torch.Tensor:
        tensors = self.source.read(weight.parts.values())
        return weight.decode({role: tensors[name] for role, name in weight.parts.items()}, self.dtype)

    def fingerprint(self) -> str:
        """Hash of what identifies the weights: the stored ones, and the dtype that they are read in."""
        return hashlib.sha256(f"{self.source.fingerprint()}:{self.dtype}".encode()).hexdigest()


def _shards(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: give a model folder or a hub id")
    index = directory / "model.safetensors.index.json"
    if index.exists():
        files = sorted({_inside(directory, name, index) for name in read_index(directory).values()})
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointError(
                f"{directory}: shard {missing[0]} named by {index.name} is missing: download it again"
            )
        if files:
            return files
        raise CheckpointError(f"{index} names no shards: download it again")
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{directory} holds pickled weights only ({pickled[0]}), which could run code when loaded: "
            "convert them first, for a model that you trust with "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
        )
    raise CheckpointError(f"{directory} holds no *.safetensors weights")


def read_index(directory: Path) -> dict[str, str]:
    """Tensor → name of the shard that holds it, from the index of a folder of shards.

    Raises:
        CheckpointError: it is none, or names a shard outside the folder.
    """
    index = directory / "model.safetensors.index.json"
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict):
        raise CheckpointError(f"{index} is not a valid index (it has no weight_map of names): download it again")
    for name in found.values():
        _inside(directory, name, index)
    return found


def _inside(directory: Path, name: Any, index: Path) -> Path:
    if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
        raise CheckpointError(f"{index} names a shard outside its folder: {name!r}")
    return directory / name


def read_header(file: Path, headers_only: bool = False) -> dict[str, TensorEntry]:
    """Names, shapes, dtypes and byte ranges of a safetensors file, checked against its size.

    headers_only: the file may end after the header.

    Raises:
        CheckpointError: the file is truncated, no safetensors, lies outside its folder, or has a header that lies.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is no file: download it again")
    if not stays_inside(file, file.parent):
        raise CheckpointError(f"{file} is a link out of its folder, to {file.resolve()}: put the file itself there")
    size = file.stat().st_size
    with open(file, "rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise CheckpointError(f"{file} is truncated or no safetensors file ({size} bytes): download it again")
        header = _parse(file, handle.read(length))
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        entry = _entry(file, name, info, 8 + length)
        if entry.end > size and not headers_only:
            raise CheckpointError(
                f"{file} is truncated: {name!r} ends at byte {entry.end}, the file at {size}: download it again"
            )
        entries[name] = entry
    _check_apart(file, entries)
    return entries


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: unreadable safetensors header ({error}): download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its safetensors header is no mapping: download it again")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping; two readers may take different ones of two equal names, so there must be none."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _entry(file: Path, name: str, info: Any, base: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = DTYPES[info["dtype"]], tuple(info["shape"]), info["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the header entry of {name!r} cannot be read ({error!r})") from error
    if any(type(number) is not int or not 0 <= number < MAX_OFFSET for number in (*shape, begin, end)):
        raise CheckpointError(f"{file}: the header entry of {name!r} has sizes that no file has: {str(info)[:200]}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{file}: {name!r} of shape {shape} does not fill its {end - begin} bytes")
    return TensorEntry(file, shape, dtype, base + begin, base + end)


def _check_apart(file: Path, entries: Mapping[str, TensorEntry]) -> None:
    """No two tensors share bytes: a header of a few kilobytes would stand for more memory than the file has."""
    filled = sorted((entry.begin, entry.end, name) for name, entry in entries.items() if entry.nbytes)
    for (_, end, one), (begin, _, other) in itertools.pairwise(filled):
        if begin < end:
            raise CheckpointError(f"{file}: {one!r} and {other!r} share bytes: download it again")
