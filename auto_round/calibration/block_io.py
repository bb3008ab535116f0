"""What enters and leaves a block during calibration: activations per sample, and the other arguments of its call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree


class Activations:
    """One tensor per sample, batch dimension of 1 included; in memory, or in a file when they exceed a budget.

    A file is read and written with ordinary system calls: the operating system's page cache keeps what fits, and
    the process's memory stays bounded by a batch.
    """

    def __init__(self, count: int, device: torch.device, file: Path | None = None):
        self.device = device
        self._tensors: list[torch.Tensor | None] = [None] * count
        self._layout: list[tuple[int, torch.Size, torch.dtype] | None] = [None] * count
        self._file = None if file is None else os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._path = file
        self._end = 0

    def __len__(self) -> int:
        return len(self._tensors)

    def put(self, index: int, tensor: torch.Tensor) -> None:
        """Store a sample's tensor, replacing the one before."""
        tensor = tensor.detach()
        if self._file is None:
            held = self._tensors[index]
            if held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype:
                held.copy_(tensor)
            else:
                self._tensors[index] = tensor.to(self.device, copy=True)
            return
        flat = tensor.to("cpu").contiguous().view(torch.uint8).reshape(-1).numpy()
        place = self._layout[index]
        if place is None or place[1] != tensor.shape or place[2] != tensor.dtype:
            place = (self._end, tensor.shape, tensor.dtype)
            self._end += flat.nbytes
            self._layout[index] = place
        os.pwrite(self._file, flat.data, place[0])

    def get(self, index: int) -> torch.Tensor:
        if self._file is None:
            return self._tensors[index]
        offset, shape, dtype = self._layout[index]
        buffer = torch.empty(shape, dtype=dtype)
        view = memoryview(buffer.view(torch.uint8).reshape(-1).numpy())
        os.preadv(self._file, [view], offset)
        return buffer

    def shape(self, index: int) -> torch.Size:
        return self._tensors[index].shape if self._file is None else self._layout[index][1]

    @property
    def nbytes(self) -> int:
        """Bytes of all samples."""
        return sum(self.get(index).nbytes for index in range(len(self)))

    def batch(self, indices: Sequence[int], dim: int, device: torch.device) -> torch.Tensor:
        """Samples joined along their batch dimension, on `device`."""
        tensors = [self.get(index) for index in indices]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
        return joined.to(device, non_blocking=True)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self._path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Placement:
    """Where activations are kept: on the accelerator, in memory up to `budget` bytes, else in a file of `folder`."""

    device: torch.device
    budget: int
    folder: Path

    def new(self, name: str, count: int, nbytes: int) -> Activations:
        """Room for `count` samples of `nbytes` in all."""
        if self.device.type != "cpu" or nbytes <= self.budget:
            return Activations(count, self.device)
        return Activations(count, self.device, self.folder / f"{name}.activations")


@dataclass(frozen=True)
class Hidden:
    """Marks the argument through which the previous block's output enters."""


@dataclass
class Shared:
    """An argument that is a tensor: its distinct values, which one each sample has, and its batch dimension."""

    values: list[torch.Tensor] = field(default_factory=list)
    of_sample: list[int] = field(default_factory=list)
    batch_dim: int | None = None

    def add(self, tensor: torch.Tensor) -> None:
        """Record the next sample's value; equal values are stored once."""
        for position, known in enumerate(self.values):
            same = known is tensor or (
                known.shape == tensor.shape and known.dtype == tensor.dtype and torch.equal(known, tensor)
            )
            if same:
                self.of_sample.append(position)
                return
        self.of_sample.append(len(self.values))
        self.values.append(tensor.detach())

    def batch(self, indices: Sequence[int], device: torch.device) -> torch.Tensor:
        chosen = [self.of_sample[index] for index in indices]
        first = self.values[chosen[0]]
        if len(indices) == 1 or (self.batch_dim is None and len(set(chosen)) == 1):
            return first.to(device)
        if self.batch_dim is None:
            raise ValueError("samples differ in an argument that has no batch dimension")
        if len(set(chosen)) == 1:
            sizes = [-1] * first.dim()
            sizes[self.batch_dim] = len(indices)
            return first.to(device).expand(sizes)
        return torch.cat([self.values[position] for position in chosen], self.batch_dim).to(device)


@dataclass
class BlockCall:
    """How a block is called: the tree of its arguments with `Hidden`, `Shared` or plain values as leaves."""

    tree: Any
    leaves: list[Any]

    def arguments(self, indices: Sequence[int], hidden: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
        device = hidden.device
        filled = [
            hidden if isinstance(leaf, Hidden) else leaf.batch(indices, device) if isinstance(leaf, Shared) else leaf
            for leaf in self.leaves
        ]
        return pytree.tree_unflatten(filled, self.tree)

    @property
    def batches(self) -> bool:
        """Whether samples can be joined: no argument differs between samples without a batch dimension."""
        return all(
            leaf.batch_dim is not None or len(leaf.values) == 1 for leaf in self.leaves if isinstance(leaf, Shared)
        )


def first_tensor(output: Any) -> torch.Tensor:
    """The hidden state in a block's output: the output itself, or the first item of a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]


def same_length_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Split sample indices into batches of at most `size` whose samples have one length."""
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    return [group[i : i + size] for group in by_length.values() for i in range(0, len(group), size)]


MICRO_TOKENS = 1024
"""Tokens per forward on a CPU: activations of small batches stay in its cache, and memory stays small."""


def micro_batch(lengths: Sequence[int], device: torch.device, batch_size: int) -> int:
    """Samples to run at once: what fits the cache of a CPU, a batch elsewhere."""
    return max(1, MICRO_TOKENS // max(lengths)) if device.type == "cpu" else batch_size


@dataclass
class BlockIO:
    """All samples' activations at one block, with its call; what an algorithm learns from.

    inputs: what enters the quantized block; targets: what the original block makes of the original inputs.
    """

    call: BlockCall
    inputs: Activations
    targets: Activations
    lengths: list[int]
    masks: list[torch.Tensor | None]
    hidden_dim: int
    device: torch.device

    def arguments(self, indices: Sequence[int]) -> tuple[tuple, dict[str, Any]]:
        hidden = self.inputs.batch(indices, self.hidden_dim, self.device)
        return self.call.arguments(indices, hidden)

    def target(self, indices: Sequence[int]) -> torch.Tensor:
        return self.targets.batch(indices, self.hidden_dim, self.device)

    def mask(self, indices: Sequence[int]) -> torch.Tensor | None:
        """[batch, length] of 0 and 1, or None when every token counts."""
        chosen = [self.masks[index] for index in indices]
        if all(mask is None for mask in chosen):
            return None
        ones = torch.ones(1, self.lengths[indices[0]])
        return torch.cat([ones if mask is None else mask.float() for mask in chosen]).to(self.device)

    def split(self, indices: Sequence[int], size: int) -> list[list[int]]:
        """Micro-batches of samples of equal length, in order."""
        if not self.call.batches:
            size = 1
        groups = same_length_batches([self.lengths[index] for index in indices], size)
        return [[indices[position] for position in group] for group in groups]
