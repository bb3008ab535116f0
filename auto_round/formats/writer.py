"""Writes a checkpoint folder: sharded safetensors with one tensor in memory at a time, side files and configs.

Shapes and dtypes are known before any weight is computed, so every shard's header and every tensor's offset are fixed
in advance and tensors may arrive in any order. Shards grow under a `.partial` name and get their real one in `close()`,
after all tensors have arrived; config.json is written last, so a folder that has one is complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from auto_round.formats.base import TensorShape
from auto_round.utils.files import sync

# safetensors' names of dtypes.
DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
INDEX = "model.safetensors.index.json"
_PARTIAL = ".partial"
_SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.partial)?")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class _Slot:
    """Where a tensor goes: its file (index), its byte range there, and what it must look like."""

    file: int
    start: int
    size: int
    shape: TensorShape


class CheckpointWriter:
    """Streams tensors into `model.safetensors`, or into shards with an index when they exceed `max_shard_size`.

    Use as a context manager, or call `close()` (success) or `abort()` (removes what was begun).

    Raises:
        ValueError: a name given twice or unknown, a wrong shape or dtype, tensors missing at `close()`.
        OSError: the folder has too little space, before anything is written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tensors: Sequence[tuple[str, TensorShape]],
        max_shard_size: int | str = "5GB",
        metadata: Mapping[str, str] | None = None,
    ):
        self.folder = Path(folder)
        shards = _split(tensors, parse_size(max_shard_size))
        self.files = _shard_names(len(shards))
        self._slots: dict[str, _Slot] = {}
        headers = [self._lay_out(i, shard, dict(metadata or {"format": "pt"})) for i, shard in enumerate(shards)]
        self.weight_map = {name: self.files[slot.file] for name, slot in self._slots.items()}
        self.total_size = sum(slot.size for slot in self._slots.values())
        # Tensors that have not come, each with the slices of it that have.
        self._missing: dict[str, set[int]] = {name: set() for name, _ in tensors}
        self._open: dict[int, int] = {}  # file index → descriptor, until the file's last tensor has come
        self._left = [len(shard) for shard in shards]
        self._ends = [
            len(header) + sum(_nbytes(shape) for _, shape in shard)
            for header, shard in zip(headers, shards, strict=True)
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_space(sum(self._ends))
        try:
            for index, header in enumerate(headers):
                self._start(index, header)
        except BaseException:
            self.abort()
            raise

    def _lay_out(self, index: int, shard: list[tuple[str, TensorShape]], metadata: dict[str, str]) -> bytes:
        """Fix the offsets of a shard's tensors; returns its length word and header."""
        header: dict[str, Any] = {"__metadata__": metadata}
        offset = 0
        # Wide dtypes first keeps every tensor aligned to its own width.
        for name, shape in sorted(shard, key=lambda item: -item[1].dtype.itemsize):
            if name in self._slots:
                raise ValueError(f"tensor {name!r} is listed twice")
            size = _nbytes(shape)
            self._slots[name] = _Slot(index, offset, size, shape)
            header[name] = {
                "dtype": DTYPES[shape.dtype],
                "shape": list(shape.shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        for name, _ in shard:
            slot = self._slots[name]
            self._slots[name] = _Slot(slot.file, slot.start + len(head), slot.size, slot.shape)
        return head

    def _check_space(self, needed: int) -> None:
        # Left-overs of an interrupted run are overwritten, so their space counts as free.
        reusable = sum(path.stat().st_size for path in map(self._partial, range(len(self.files))) if path.exists())
        free = shutil.disk_usage(self.folder).free + reusable
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"the checkpoint needs {needed:,} bytes in {len(self.files)} file(s) and the disk has {free:,} free",
                str(self.folder / self.files[0]),
            )

    def _partial(self, index: int) -> Path:
        return self.folder / (self.files[index] + _PARTIAL)

    def _start(self, index: int, header: bytes) -> None:
        with self._explained(index, "beginning the file"), open(self._partial(index), "wb") as file:
            file.write(header)
            file.truncate(self._ends[index])

    def write(self, name: str, tensor: torch.Tensor, index: int | None = None) -> None:
        """Put one tensor where it belongs, or slice `index` of its first dimension. The order of calls does not matter.

        Raises:
            ValueError: no such tensor or slice was announced, it looks otherwise, or it is there already.
        """
        slot = self._slots.get(name)
        if slot is None:
            raise ValueError(f"tensor {name!r} was not announced")
        shape = tuple(slot.shape.shape)
        if index is not None and not (shape and 0 <= index < shape[0]):
            raise ValueError(f"tensor {name!r} has no slice {index}, announced as {_describe(slot.shape)}")
        part = TensorShape(shape if index is None else shape[1:], slot.shape.dtype)
        which = f"tensor {name!r}" if index is None else f"slice {index} of tensor {name!r}"
        come = self._missing.get(name)
        if come is None or index in come or (index is None and come):
            raise ValueError(f"{which} is written a second time")
        got = TensorShape(tuple(tensor.shape), tensor.dtype)
        if got != part:
            raise ValueError(f"{which} is {_describe(got)}, announced as {_describe(part)}")
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        start = slot.start + (index or 0) * _nbytes(part)
        self._write_bytes(slot.file, start, memoryview(flat.view(torch.uint8).numpy()))
        if index is not None:
            come.add(index)
        if index is None or len(come) == shape[0]:
            self._finish(name, slot.file)

    def _write_bytes(self, file: int, start: int, data: memoryview) -> None:
        if file not in self._open:
            self._open[file] = os.open(self._partial(file), os.O_WRONLY | getattr(os, "O_BINARY", 0))
        size = len(data)
        with self._explained(file, f"writing {size:,} bytes at {start:,}"):
            os.lseek(self._open[file], start, os.SEEK_SET)
            while data:
                data = data[os.write(self._open[file], data) :]  # a call moves at most about 2 GB

    def _finish(self, name: str, file: int) -> None:
        """A tensor has come, and with the last one of its file that is flushed."""
        del self._missing[name]
        self._left[file] -= 1
        if not self._left[file]:
            with self._explained(file, "flushing"):
                os.fsync(self._open[file])
                os.close(self._open.pop(file))

    @contextlib.contextmanager
    def _explained(self, file: int, doing: str) -> Iterator[None]:
        """Say of an error of the system what was being done to which file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"{doing} failed: {error.strerror}", str(self._partial(file))) from error

    def close(self) -> None:
        """Give the shards their names and write the index, all flushed to disk. Fails if a tensor never came.

        The config.json of an earlier export in the folder goes first: it would describe the wrong weights.
        """
        if self._missing:
            names = list(self._missing)
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            raise ValueError(f"{len(names)} tensor(s) were never written: {shown}")
        (self.folder / "config.json").unlink(missing_ok=True)
        for index, file in enumerate(self.files):
            os.replace(self._partial(index), self.folder / file)
        self._remove_stale()
        if len(self.files) > 1:
            total = {"total_size": self.total_size}
            write_json(self.folder / INDEX, {"metadata": total, "weight_map": dict(sorted(self.weight_map.items()))})
        sync(self.folder)

    def _remove_stale(self) -> None:
        """Weight files of an earlier export of another size: a reader would prefer them to ours."""
        for path in self.folder.iterdir():
            if (_SHARD_NAME.fullmatch(path.name) and path.name not in self.files) or path.name == INDEX:
                path.unlink()

    def abort(self) -> None:
        """Drop everything written so far; files of an earlier export stay."""
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()
        for index in range(len(self.files)):
            self._partial(index).unlink(missing_ok=True)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def parse_size(size: int | str) -> int:
    """Bytes meant by 5000000000, "5GB" (decimal) or "5GiB" (binary)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if match is None or match[2] not in _UNITS or (number := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise ValueError(f"max_shard_size={size!r} is not a number of bytes or a size such as '5GB' or '512MB'")
    return number


def _nbytes(shape: TensorShape) -> int:
    size = shape.dtype.itemsize
    for length in shape.shape:
        size *= length
    return size


def _describe(shape: TensorShape) -> str:
    return f"{str(shape.dtype).removeprefix('torch.')}{list(shape.shape)}"


def _split(tensors: Sequence[tuple[str, TensorShape]], limit: int) -> list[list[tuple[str, TensorShape]]]:
    """Fill shards in the given order; a tensor above the limit gets a shard of its own."""
    shards: list[list[tuple[str, TensorShape]]] = [[]]
    filled = 0
    for name, shape in tensors:
        size = _nbytes(shape)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_json(path: Path, data: Any) -> None:
    """Write JSON under a temporary name, flush it and rename: the file is there whole or not at all."""
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_NO_WEIGHTS = ("spk_dict.pt",)  # the voices of Qwen omni models: carried over, never opened
# Written by `write_config`, or statements about a quantization of the source that no longer hold.
_REWRITTEN = (
    "config.json",
    "quantization_config.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
)


def copy_side_files(source_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> list[str]:
    """Copy what belongs to a model beside its weights and config: tokenizer, processor, code, licence, sub-folders.

    Left out: weight files and their indexes, the root config.json and records of an earlier quantization, hidden and
    cache entries. Links are followed, as a hub cache consists of them. Returns the copied paths, relative.
    """
    source, target = Path(source_dir), Path(out_dir)
    if source.resolve() == target.resolve():
        raise ValueError(f"the output folder {target} is the source model's folder: choose another one")
    copied = []
    for relative in _side_files(source, target.resolve()):
        path = target / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, path)
        copied.append(relative.as_posix())
    return copied


def unreadable_side_file(source_dir: Path, out_dir: Path) -> Path | None:
    """A file that `copy_side_files` could not copy (a link to nowhere, or one without permission), if there is one."""
    files = (source_dir / relative for relative in _side_files(source_dir, out_dir.resolve()))
    return next((file for file in files if not os.access(file, os.R_OK)), None)


def _side_files(source: Path, excluded: Path) -> Iterator[Path]:
    """Relative paths of side files, sorted; a folder reached twice through links is walked once."""
    seen: set[Path] = set()
    for folder, children, files in os.walk(source, followlinks=True):
        here = Path(folder)
        if here.resolve() in seen or here.resolve() == excluded:
            children.clear()
            continue
        seen.add(here.resolve())
        children[:] = sorted(c for c in children if not c.startswith(".") and c not in ("__pycache__", "cache"))
        for name in sorted(files):
            is_rewritten = here == source and name in _REWRITTEN
            is_weight = name.lower().endswith((*_WEIGHTS, _PARTIAL)) and name not in _NO_WEIGHTS
            if not (is_rewritten or name.startswith(".") or is_weight):
                yield (here / name).relative_to(source)


def write_config(
    source_config: Mapping[str, Any],
    quantization_config: Mapping[str, Any] | None,
    out_dir: str | os.PathLike[str],
) -> None:
    """Write quantization_config.json and, last of all, config.json: the source's keys in their order, then ours."""
    folder = Path(out_dir)
    config = _without_quantization(source_config)
    separate = folder / "quantization_config.json"
    if quantization_config is None:
        separate.unlink(missing_ok=True)
    else:
        config["quantization_config"] = dict(quantization_config)
        write_json(separate, config["quantization_config"])
    write_json(folder / "config.json", config)
    sync(folder)


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the statements of an earlier quantization, in sub-configs too (readers look there)."""
    return {
        key: _without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in ("quantization_config", "compression_config")
    }
