"""The memory that a run may use, as told by the user, and the settings by which a run keeps within it.

The settings are chosen before the run (`compressors/choose.py`), by its estimate. What can change the last bits of a
result, the size of micro-batches, follows from `max_memory` alone and never from what happens to be free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.formats.writer import parse_size
from auto_round.settings import SettingsError

RELOAD_LIMIT = 512 << 20  # bytes of a result that are loaded as a whole, where no budget says otherwise


class DoesNotFitError(RuntimeError):
    """A run that needs more memory than there is; the message says what to change."""


@dataclass(frozen=True)
class Budget:
    """Memory that a run may use.

    ram: bytes of the process, None for what is free. devices: (CUDA index, bytes) pairs.
    off_device: samples' activations stay out of an accelerator's memory, although they would fit.
    sparing: half of what is free is left to others where that costs little.
    """

    ram: int | None = None
    devices: tuple[tuple[int, int], ...] = ()
    off_device: bool = False
    sparing: bool = True

    def of(self, device: torch.device) -> int | None:
        """Bytes that may be used of an accelerator; None where nothing is said."""
        return dict(self.devices).get(device.index or 0) if device.type == "cuda" else None

    @property
    def is_told(self) -> bool:
        return self.ram is not None or bool(self.devices)


@dataclass(frozen=True)
class Working:
    """How a run uses memory.

    halvings: how often the usual micro-batch is halved. keep: where samples' activations wait: "device", "memory" or
    "file". logits: where those of the original wait for the comparison at the end: "memory" or "file". reload: bytes of
    a result up to which Transformers is made to load the whole of it, as a check.
    """

    halvings: int = 0
    keep: str = "memory"
    logits: str = "memory"
    reload: int = RELOAD_LIMIT

    def micro(self, usual: int) -> int:
        """Samples of one forward, of which `usual` are run at once where memory is no matter."""
        return max(1, usual >> self.halvings)


def parse_budget(max_memory: Any, low_gpu_mem_usage: bool = False, low_cpu_mem_usage: bool = True) -> Budget:
    """A budget from `max_memory`: a size of RAM, {"cpu": "4GiB", 0: "20GiB"}, or the text "cpu=4GiB,0=20GiB".

    Raises:
        SettingsError: neither; the message quotes what is wrong.
    """
    ram, devices = None, {}
    for name, size in _pairs(max_memory).items():
        key = str(name).strip().lower().removeprefix("cuda:").replace("cuda", "0")
        nbytes = _bytes(name, size)
        if key in ("cpu", "ram"):
            ram = nbytes
        elif key.isdigit():
            devices[int(key)] = nbytes
        else:
            raise SettingsError(f"max_memory: {name!r} is no memory: use 'cpu' for RAM, or the number of a CUDA device")
    return Budget(ram, tuple(sorted(devices.items())), bool(low_gpu_mem_usage), bool(low_cpu_mem_usage))


def _pairs(given: Any) -> Mapping[Any, Any]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return given
    if isinstance(given, str) and "=" in given:
        pairs = [part.partition("=") for part in given.split(",") if part.strip()]
        names = [name.strip() for name, _, _ in pairs]
        if len(set(names)) < len(names):
            raise SettingsError(f"max_memory={given!r} gives a memory twice")
        return {name.strip(): size.strip() for name, _, size in pairs}
    return {"cpu": given}


def _bytes(name: Any, size: Any) -> int:
    try:
        if isinstance(size, bool) or not isinstance(size, (int, str)):
            raise ValueError
        return parse_size(size)
    except ValueError:
        raise SettingsError(
            f"max_memory: {size!r} for {name!r} is neither a number of bytes nor a size such as '4GiB' or '500MB'"
        ) from None
