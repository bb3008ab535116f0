"""What happens when memory is refused: the piece of work is begun anew with half as many samples at once.

Only when a single sample does not fit is the run given up, with a message that says where and what to change. Blocks
that are finished are in the work folder by then.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from auto_round.budget import DoesNotFitError
from auto_round.utils.device import is_out_of_memory, trim_memory

T = TypeVar("T")


def free_memory_now(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    trim_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass
class MicroBatch:
    """How many samples run at once: `size`, which is halved for the rest of a run whenever memory is refused.

    note: called with a sentence for the report.
    """

    size: int
    device: torch.device
    note: Callable[[str], None] = lambda text: None

    def attempt(self, what: str, work: Callable[[int], T], most: int | None = None) -> T:
        """Do `work(samples at once)`, anew with fewer as often as memory is refused.

        Args:
            what: names the block and what is done, as in "tuning model.layers.3".
            most: samples that can be joined, where these are fewer than the micro-batch.

        Raises:
            DoesNotFitError: memory is refused to a single sample.
        """
        while True:
            size = min(self.size, most or self.size)
            with contextlib.suppress(_Refused):
                return _caught(work, size)
            # The failed attempt's tensors hung on its error, which is gone by now.
            free_memory_now(self.device)
            if size == 1:
                raise too_large(what)
            self.size = size // 2
            self.note(f"memory ran out while {what} with {size} samples at once: from there on it is {self.size}")


class _Refused(Exception):
    """Memory was refused. Holds nothing of the error, whose frames hold tensors."""


def _caught(work: Callable[[int], T], size: int) -> T:
    try:
        return work(size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    raise _Refused


def too_large(what: str) -> DoesNotFitError:
    return DoesNotFitError(
        f"memory ran out while {what}, with one sample at a time: use a smaller seqlen, iters=0, or a machine or "
        "device with more memory; finished blocks are kept, and the same command goes on behind them"
    )


@contextlib.contextmanager
def naming_the_lack(what: str) -> Iterator[None]:
    """Turn a refusal of memory into an error that says what was being done.

    Raises:
        DoesNotFitError: memory is refused inside.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFitError(
            f"memory ran out while {what} ({' '.join(str(error).split())[:120] or type(error).__name__}): close other "
            "programs, or use a machine with more memory; finished blocks are kept, and the same command goes on"
        ) from error
