"""A checkpoint directory as a source of tensors: names, shapes and dtypes from the headers alone, bytes on demand.

Only safetensors are read; pickled weights are refused, since unpickling runs code. Headers are checked against file
sizes before anything is trusted, so that a truncated shard is reported by name and not as a crash hours later.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    Raises:
        CheckpointError: no safetensors, a shard that is missing or truncated, or a header that lies.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.entries: dict[str, TensorEntry] = {}
        for file in _shards(self.directory):
            for name, entry in read_header(file).items():
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


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Names, shapes, dtypes and byte ranges of a safetensors file, checked against its size."""
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
        if entry.end > size:
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
