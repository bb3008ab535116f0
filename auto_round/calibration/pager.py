"""Keeps the large tensors of paused forwards in a file, so that memory is bounded by a sample.

A tensor is put away by writing its bytes and emptying its storage; the objects that the paused forward holds stay the
same and are filled again before it runs on. The file is read and written with ordinary system calls: the operating
system's page cache keeps what fits.
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

SMALL = 1 << 14  # bytes below which a tensor is not worth a system call


@dataclass
class _Page:
    """Where a tensor lies in the file. version: of the tensor's contents when they were written."""

    tensor: weakref.ref
    offset: int
    nbytes: int
    version: int


class Pager:
    """A file of tensors. `evict` and `restore` go by sample; `read` gives one tensor's values and leaves it empty."""

    def __init__(self, file: Path):
        self._path = file
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
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
        copy = torch.empty(leaf.shape, dtype=leaf.dtype)
        self._fill(copy, page)
        return copy

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self._path.unlink(missing_ok=True)

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
        os.pwrite(self._file, _bytes(tensor), offset)
        return _Page(weakref.ref(tensor), offset, tensor.nbytes, tensor._version)

    def _fill(self, tensor: torch.Tensor, page: _Page) -> None:
        os.preadv(self._file, [_bytes(tensor)], page.offset)


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is large, and all of its storage: only then can the storage be emptied."""
    storage = tensor.untyped_storage()
    return (
        tensor.device.type == "cpu"
        and tensor.nbytes >= SMALL
        and tensor.is_contiguous()
        and storage.nbytes() == tensor.nbytes
        and storage.resizable()
    )


def _bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory. Not through NumPy: a storage that NumPy has seen cannot be resized any more."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
