"""A checkpoint directory as a source of tensors: names, shapes and dtypes from the headers alone, bytes on demand.

A `DequantizedCheckpoint` is one whose weights are stored as codes and scales and shown as floats; which formats there
are, and how they decode, is `auto_round.modeling.sources`' business.

Only safetensors are read; pickled weights are refused, since unpickling runs code. Headers are checked against file
sizes before anything is trusted, so that a truncated shard is reported by name and not as a crash hours later.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

MAX_HEADER = 100_000_000  # the limit of the safetensors specification
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


class CheckpointError(ValueError):
    """A model directory that cannot be read; the message names the file and what to do."""


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
            with safe_open(file, framework="pt") as handle:
                for name in wanted:
                    tensors[name] = handle.get_tensor(name)
        return tensors

    def read_one(self, name: str) -> torch.Tensor:
        return self.read([name])[name]

    def fingerprint(self) -> str:
        """Hash of what identifies the weights without reading them all: names, layout, sizes, and sampled bytes."""
        digest = hashlib.sha256()
        for file in sorted({entry.file for entry in self.entries.values()}):
            digest.update(f"{file.name}:{file.stat().st_size}".encode())
            with open(file, "rb") as handle:
                handle.seek(0)
                digest.update(handle.read(65536))
                for part in range(1, 9):
                    handle.seek(file.stat().st_size * part // 9)
                    digest.update(handle.read(4096))
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
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} is not a valid index ({error}): download it again") from error
        files = sorted({_inside(directory, name, index) for name in weight_map.values()})
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointError(
                f"{directory}: shard {missing[0]} named by {index.name} is missing: download it again"
            )
        return files
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


def _inside(directory: Path, name: Any, index: Path) -> Path:
    if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
        raise CheckpointError(f"{index} names a shard outside its folder: {name!r}")
    return directory / name


def read_header(file: Path, headers_only: bool = False) -> dict[str, TensorEntry]:
    """Names, shapes, dtypes and byte ranges of a safetensors file, checked against its size.

    headers_only: the file may end after the header.
    """
    size = file.stat().st_size
    with open(file, "rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise CheckpointError(f"{file} is truncated or no safetensors file ({size} bytes): download it again")
        try:
            header = json.loads(handle.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file}: unreadable safetensors header ({error}): download it again") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        entry = _entry(file, name, info, 8 + length)
        if entry.end > size and not headers_only:
            raise CheckpointError(
                f"{file} is truncated: {name!r} ends at byte {entry.end}, the file at {size}: download it again"
            )
        entries[name] = entry
    return entries


def _entry(file: Path, name: str, info: dict[str, Any], base: int) -> TensorEntry:
    try:
        dtype, shape = DTYPES[info["dtype"]], tuple(int(size) for size in info["shape"])
        begin, end = (int(offset) for offset in info["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the header entry of {name!r} cannot be read ({error!r})") from error
    count = 1
    for size in shape:
        count *= size
    if begin < 0 or min(shape, default=0) < 0 or end - begin != count * dtype.itemsize:
        raise CheckpointError(f"{file}: {name!r} of shape {shape} does not fill its {end - begin} bytes")
    return TensorEntry(file, shape, dtype, base + begin, base + end)
