"""What an algorithm learns from: a block's arguments for every sample, joined into batches, and the wanted outputs."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from auto_round.calibration.forwards import Forwards
from auto_round.calibration.pager import Pager, raw_bytes
from auto_round.utils.files import read_at, write_at

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Activations:
    """One tensor per sample, on the device `home`, or in a file.

    A file is read and written with ordinary system calls: the operating system's page cache keeps what fits, and
    the process's memory stays bounded by a batch.
    """

    def __init__(self, count: int, home: torch.device, file: Path | None = None):
        self.home = home
        self._tensors: list[torch.Tensor | None] = [None] * count
        self._layout: list[tuple[int, torch.Size, torch.dtype] | None] = [None] * count
        self._file = None if file is None else os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._path = file
        if file is not None:
            file.unlink()  # the open file stays, and even a killed process leaves nothing behind
        self._end = 0

    def put(self, index: int, tensor: torch.Tensor) -> None:
        """Store a sample's tensor, replacing the one before."""
        tensor = tensor.detach()
        if self._file is None:
            self._tensors[index] = tensor.to(self.home)
            return
        whole = tensor.to("cpu").contiguous()
        place = self._layout[index]
        if place is None or place[1] != tensor.shape or place[2] != tensor.dtype:
            place = (self._end, tensor.shape, tensor.dtype)
            self._end += whole.nbytes
            self._layout[index] = place
        write_at(self._file, raw_bytes(whole), place[0], self._path)

    def get(self, index: int) -> torch.Tensor:
        """A sample's tensor, where it is kept; what lies in a file comes to the CPU."""
        if self._file is None:
            return self._tensors[index]
        offset, shape, dtype = self._layout[index]
        buffer = torch.empty(shape, dtype=dtype)
        read_at(self._file, raw_bytes(buffer), offset, self._path)
        return buffer

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


@dataclass(frozen=True)
class Joint:
    """How samples join into a batch at one block call, found by comparing a call of one row with one of several.

    arguments, outputs: for each leaf the dimension that grows with the batch, None for what all samples share.
    joins: False where some leaf grows otherwise, or where the block computes something else for a batch; `reason`
    says so. agrees: a row of the batch's output is what the row alone gives.
    changes: the block writes into its arguments, so every call needs copies.
    """

    arguments: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    joins: bool
    agrees: bool = True
    changes: bool = False
    reason: str = ""


def main_tensor(output: Any) -> tuple[int, torch.Tensor]:
    """The hidden state in a block's output, with its place among the leaves: the first tensor of floats."""
    for position, leaf in enumerate(pytree.tree_leaves(output)):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return position, leaf
    raise ValueError("the block's output has no tensor of floats")


MICRO_TOKENS = 1024
"""Tokens per forward on a CPU: activations of small batches stay in its cache, and memory stays small."""
EXPERT_TOKENS = 256
"""Tokens that an expert should be given at once: products of 64 rows run at two thirds of the speed of 256 rows."""


def micro_batch(lengths: Sequence[int], device: torch.device, batch_size: int, spread: float = 1) -> int:
    """Samples to run at once: what fits the cache of a CPU, a batch elsewhere.

    spread: experts of a block for each that a token visits; with many, more tokens are run at once, up to four times.
    """
    tokens = max(MICRO_TOKENS, min(4 * MICRO_TOKENS, int(EXPERT_TOKENS * spread)))
    return max(1, tokens // max(lengths)) if device.type == "cpu" else batch_size


class Inputs:
    """The arguments of all samples at the block call that their forwards wait at."""

    def __init__(self, forwards: Forwards, joint: Joint):
        self._forwards, self._joint = forwards, joint
        self._keys = [self._key(index) for index in range(len(forwards))]

    def _key(self, index: int) -> Any:
        """Samples of one key can be joined."""
        call = self._forwards.call(index)
        if not self._joint.joins or len(call.leaves) != len(self._joint.arguments):
            return index
        shape: list[Any] = [call.tree]
        for leaf, dim in zip(call.leaves, self._joint.arguments, strict=True):
            if not isinstance(leaf, torch.Tensor):
                shape.append(leaf if isinstance(leaf, _PLAIN) else id(leaf))
            elif dim is None and leaf.numel():
                shape.append((leaf.data_ptr() or id(leaf), leaf.shape))
            else:
                shape.append((leaf.dtype, leaf.shape))
        return tuple(str(part) for part in shape)

    def split(self, indices: Sequence[int], size: int) -> list[list[int]]:
        """Micro-batches of at most `size` samples that can be joined, in order."""
        groups: dict[Any, list[int]] = {}
        for index in indices:
            groups.setdefault(self._keys[index], []).append(index)
        return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]

    def arguments(self, indices: Sequence[int]) -> tuple[tuple, dict[str, Any]]:
        """(args, kwargs) of one call of the block for these samples; objects that hold state are copies."""
        call = self._forwards.call(indices[0])
        columns = zip(*(self._forwards.leaves(index) for index in indices), strict=True)
        dims = self._joint.arguments if len(indices) > 1 else [None] * len(call.leaves)
        leaves = [_join(column, dim, self._joint.changes) for column, dim in zip(columns, dims, strict=True)]
        return pytree.tree_unflatten(leaves, call.tree)


def _join(column: tuple, dim: int | None, clone: bool) -> Any:
    if isinstance(column[0], torch.Tensor) and dim is not None and len(column) > 1:
        return torch.cat(column, dim)
    return own_leaf(column[0], clone)


def own_leaf(leaf: Any, clone: bool) -> Any:
    """A leaf for a call that must leave the original as it is: objects that may hold state are copied."""
    if isinstance(leaf, torch.Tensor):
        return leaf.clone() if clone else leaf
    return leaf if isinstance(leaf, _PLAIN) or callable(leaf) else copy.deepcopy(leaf)


@dataclass
class BlockIO:
    """All samples' activations at one block; what an algorithm learns from.

    inputs: what enters the quantized block; targets: what the original block makes of the original inputs.
    lengths: tokens per sample; masks: per sample [1, length] of 0 and 1, or None. micro: samples of one forward.
    """

    inputs: Inputs
    targets: Activations
    joint: Joint
    main: int
    lengths: list[int]
    masks: list[torch.Tensor | None]
    device: torch.device
    micro: int

    @property
    def batch_dim(self) -> int:
        """Of the output's hidden state."""
        return self.joint.outputs[self.main] or 0 if self.main < len(self.joint.outputs) else 0

    def split(self, indices: Sequence[int], size: int) -> list[list[int]]:
        return self.inputs.split(indices, size)

    def arguments(self, indices: Sequence[int]) -> tuple[tuple, dict[str, Any]]:
        return self.inputs.arguments(indices)

    def output(self, output: Any) -> torch.Tensor:
        """The hidden state of a block's output."""
        return pytree.tree_leaves(output)[self.main]

    def target(self, indices: Sequence[int]) -> torch.Tensor:
        tensors = [self.targets.get(index) for index in indices]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors, self.batch_dim)
        return joined.to(self.device, non_blocking=True)

    def mask(self, indices: Sequence[int], like: torch.Tensor) -> torch.Tensor | None:
        """0 and 1 for the tokens of a hidden state, in a shape that multiplies it; None when every token counts."""
        chosen = [self.masks[index] for index in indices]
        tokens = self.batch_dim + 1
        if all(mask is None for mask in chosen) or like.dim() <= tokens:
            return None
        length = like.shape[tokens]
        if any(self.lengths[index] != length for index in indices):
            return None
        ones = torch.ones(1, length)
        joined = torch.cat([ones if mask is None else mask.float() for mask in chosen]).to(like.device)
        shape = [1] * like.dim()
        shape[self.batch_dim], shape[tokens] = len(indices), length
        return joined.view(shape)


@dataclass(frozen=True)
class Placement:
    """Where samples' activations wait: on the `device` of the run, in "memory", or in a "file" of `folder`.

    prefix: of the files' names, where several processes have theirs in one folder.
    """

    device: torch.device
    keep: str
    folder: Path
    prefix: str = ""

    @property
    def _stays(self) -> bool:
        """Whether tensors wait where they were made."""
        return self.keep == "device" or (self.keep == "memory" and self.device.type == "cpu")

    def pager(self, name: str) -> Pager | None:
        """What puts the tensors of waiting forwards away; None where they stay."""
        return None if self._stays else Pager(self._file(name))

    def activations(self, count: int, name: str) -> Activations:
        home = self.device if self._stays else torch.device("cpu")
        return Activations(count, home, self._file(name))

    def _file(self, name: str) -> Path | None:
        return self.folder / f"{self.prefix}{name}.activations" if self.keep == "file" else None
