"""Keeps the large tensors of paused forwards elsewhere, so that a device's memory is bounded by a sample.

A tensor is put away by copying its bytes and emptying its storage; the objects that the paused forward holds stay the
same and are filled again before it runs on. Elsewhere is a file, read and written with ordinary system calls so that
the operating system's page cache keeps what fits, or for an accelerator's tensors the memory of the host.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auto_round.utils.files import read_at, write_at

SMALL = 1 << 14  # bytes below which a tensor is not worth a system call


@dataclass
class _Page:
    """Where a tensor lies. version: of the tensor's contents when they were written."""

    tensor: weakref.ref
    offset: int
    nbytes: int
    version: int


class Pager:
    """Tensors in a file, or on the host (None).

    `evict` and `restore` go by sample; `read` gives one tensor's values and leaves it empty.
    """

    def __init__(self, file: Path | None):
        self._shelf = _Host() if file is None else _File(file)
        self._end = 0
        self._free: dict[int, list[int]] = {}
        self._pages: dict[int, list[_Page]] = {}

    def evict(self, sample: int, tensors: Sequence[torch.Tensor]) -> None:
        """Put a sample's tensors away: these, and those of earlier calls that its forward still holds."""
        pages = self._alive(sample)
        known = {id(page.tensor()) for page in pages}
        for tensor in tensors:
            if id(tensor) not in known and _is_whole(tensor):
                pages.append(self._write(tensor, self._place(tensor.nbytes)))
                known.add(id(tensor))
        for page in pages:
            tensor = page.tensor()
            if tensor is None or not tensor.untyped_storage().nbytes():
                continue
            if tensor._version != page.version:
                self._write(tensor, page.offset)
            tensor.untyped_storage().resize_(0)
        self._pages[sample] = pages

    def forget(self, tensor: torch.Tensor) -> None:
        """Leave a tensor in memory from now on: it shares its storage with others."""
        for pages in self._pages.values():
            pages[:] = [page for page in pages if page.tensor() is not tensor]

    def restore(self, sample: int) -> None:
        """Fill a sample's tensors again."""
        for page in self._pages.get(sample, ()):
            tensor = page.tensor()
            if tensor is None or tensor.untyped_storage().nbytes():
                continue
            tensor.untyped_storage().resize_(page.nbytes)
            self._fill(tensor, page)
            page.version = tensor._version

    def read(self, leaf: Any) -> Any:
        """A leaf with its values: itself, or a copy read from the file while it is empty."""
        if not isinstance(leaf, torch.Tensor) or leaf.untyped_storage().nbytes() or not leaf.numel():
            return leaf
        page = next(p for pages in self._pages.values() for p in pages if p.tensor() is leaf)
        copy = torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        self._fill(copy, page)
        return copy

    def close(self) -> None:
        self._shelf.close()

    def _alive(self, sample: int) -> list[_Page]:
        alive = []
        for page in self._pages.get(sample, ()):
            if page.tensor() is None:
                self._free.setdefault(page.nbytes, []).append(page.offset)
            else:
                alive.append(page)
        return alive

    def _place(self, nbytes: int) -> int:
        if self._free.get(nbytes):
            return self._free[nbytes].pop()
        offset, self._end = self._end, self._end + nbytes
        return offset

    def _write(self, tensor: torch.Tensor, offset: int) -> _Page:
        self._shelf.put(offset, tensor)
        return _Page(weakref.ref(tensor), offset, tensor.nbytes, tensor._version)

    def _fill(self, tensor: torch.Tensor, page: _Page) -> None:
        self._shelf.get(page.offset, tensor)


class _File:
    """Tensors by their offset in a file, which is removed at the end."""

    def __init__(self, path: Path):
        self._path = path
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        path.unlink()  # the open file stays, and even a killed process leaves nothing behind

    def put(self, offset: int, tensor: torch.Tensor) -> None:
        host = tensor.cpu()  # named, as its memory is written after `raw_bytes` has returned
        write_at(self._file, raw_bytes(host), offset, self._path)

    def get(self, offset: int, tensor: torch.Tensor) -> None:
        """Fill a tensor."""
        if tensor.device.type == "cpu":
            read_at(self._file, raw_bytes(tensor), offset, self._path)
            return
        host = torch.empty(tensor.shape, dtype=tensor.dtype)
        read_at(self._file, raw_bytes(host), offset, self._path)
        tensor.copy_(host)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class _Host:
    """Copies in the host's memory, by the offset that they would have in a file."""

    def __init__(self):
        self._copies: dict[int, torch.Tensor] = {}

    def put(self, offset: int, tensor: torch.Tensor) -> None:
        self._copies[offset] = tensor.detach().to("cpu", copy=True)

    def get(self, offset: int, tensor: torch.Tensor) -> None:
        tensor.copy_(self._copies[offset])

    def close(self) -> None:
        self._copies.clear()


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is large, and all of its storage: only then can the storage be emptied."""
    storage = tensor.untyped_storage()
    return (
        tensor.nbytes >= SMALL and tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.resizable()
    )


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory, while somebody holds the tensor.

    Not through NumPy: a storage that NumPy has seen cannot be resized any more.
    """
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
