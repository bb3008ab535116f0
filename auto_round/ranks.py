"""The processes that quantize one model together, each on its share of the samples, and what they tell each other.

torchrun, accelerate or the command line starts them, and `started` finds them in the environment; `torch.distributed`
carries what is added up. A run of one process has `Ranks()`, for which every call here does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed

PATIENCE = datetime.timedelta(days=7)  # to wait for work of one rank that has no known end: an export, a slow disk
BUCKET = 16 << 20  # bytes of small tensors that are reduced in one go


class RanksError(RuntimeError):
    """Another rank has ended or differs; the message says what was being done and how to go on."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run.

    rank: its number; world: how many there are; local, here: the same among those on this machine.
    group: their `torch.distributed` group for what lies in main memory; None for one process.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    here: int = 1
    group: Any = field(default=None, repr=False, compare=False)

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.rank == 0

    # ---- samples and work ----------------------------------------------------------------------------------------

    def step_size(self, wanted: int, count: int) -> int:
        """Samples of one step over all ranks: about `wanted` of the `count` there are, the same number on each rank.

        Raises:
            RanksError: there are fewer samples than ranks.
        """
        if count < self.world:
            raise RanksError(f"{count} samples cannot be shared by {self.world} ranks: give more, or start fewer ranks")
        return min(-(-wanted // self.world), count // self.world) * self.world

    def share(self, count: int, size: int) -> list[int]:
        """This rank's samples of `count`, in order, `size` being a step's over all ranks (a multiple of `world`).

        Sample g is dealt by its place in its round of `size`, so that a step over all ranks is made of the samples
        that one process would take, whatever the number of ranks.
        """
        own = size // self.world
        return [g for g in range(count) if g % size // own == self.rank]

    def mine(self, costs: Mapping[str, float]) -> list[str]:
        """This rank's part of things that are worked on alone: the costliest first, each to whom has least to do."""
        loads, owner = [0.0] * self.world, {}
        for name in sorted(costs, key=costs.__getitem__, reverse=True):
            owner[name] = loads.index(min(loads))
            loads[owner[name]] += costs[name]
        return [name for name in costs if owner[name] == self.rank]

    # ---- what all do together ------------------------------------------------------------------------------------

    def sum_(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over all ranks, which give the same shapes in the same order."""
        self._reduce(tensors, distributed.ReduceOp.SUM)

    def max_(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its largest values over all ranks."""
        self._reduce(tensors, distributed.ReduceOp.MAX)

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """The sum of each number over all ranks, in float64."""
        if self.world == 1:
            return tuple(map(float, numbers))
        total = torch.tensor(numbers, dtype=torch.float64)
        self.sum_(total)
        return tuple(total.tolist())

    def everyone(self, message: bytes) -> list[bytes]:
        """What each rank says, by rank."""
        if self.world == 1:
            return [message]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        with _together("exchanging results"):
            distributed.all_gather(sizes, torch.tensor([len(message)]), group=self.group)
        longest = int(max(sizes))
        padded = torch.frombuffer(bytearray(message.ljust(max(longest, 1), b"\0")), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in range(self.world)]
        with _together("exchanging results"):
            distributed.all_gather(found, padded, group=self.group)
        return [one.numpy()[: int(size)].tobytes() for one, size in zip(found, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait until every rank is here, however long another works."""
        if self.world > 1:
            with _together("waiting for the other ranks"):
                distributed.monitored_barrier(self.group, timeout=PATIENCE)

    def _reduce(self, tensors: Sequence[torch.Tensor], operation: Any) -> None:
        if self.world == 1:
            return
        for bucket in _buckets(tensors):
            group = self.group if bucket[0].device.type == "cpu" else None  # None: the backend made for devices
            whole = len(bucket) == 1 and bucket[0].is_contiguous()
            flat = bucket[0] if whole else torch.cat([tensor.reshape(-1) for tensor in bucket])
            with _together("adding up what the ranks have found"):
                distributed.all_reduce(flat, operation, group=group)
            if not whole:
                parts = flat.split([tensor.numel() for tensor in bucket])
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors of one dtype and device, in order, so many small ones together that a call is worth its latency."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        alike = bucket and kind == (bucket[0].dtype, bucket[0].device)
        if bucket and not (alike and sum(one.nbytes for one in bucket) + tensor.nbytes <= BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextlib.contextmanager
def _together(what: str) -> Iterator[None]:
    """Say what it means when a call that needs all ranks fails."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("] ")[2].partition(". ")[0] or type(error).__name__
        raise RanksError(
            f"{what} failed because another rank has ended or cannot be reached: its own message says why. Finished "
            f"blocks are kept, and the same command goes on from them ({reason})"
        ) from error


def launched() -> bool:
    """Whether this process was started as one of several."""
    known = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return known and int(os.environ["WORLD_SIZE"]) > 1


def started() -> Ranks:
    """This process's ranks: those of the process group that there is, or that torchrun's environment tells of.

    Raises:
        RanksError: the others cannot be reached.
    """
    if not distributed.is_available() or not (distributed.is_initialized() or launched()):
        return Ranks()
    if not distributed.is_initialized():
        with _together("meeting the other ranks"):
            distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    if world == 1:
        return Ranks()
    local, here = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    with _together("meeting the other ranks"):
        return Ranks(rank, world, local, here, distributed.new_group(backend="gloo"))


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
