"""Choosing the device that blocks are tuned on, and the memory that a run takes."""

from __future__ import annotations

import ctypes
import errno
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from auto_round.ranks import Ranks


def pick_device(device_map: Any) -> torch.device:
    """The tuning device that a `device_map` means: an index, a name, "auto", or a list of which the first is used.

    Raises:
        ValueError: a device that is not there.
    """
    if isinstance(device_map, torch.device):
        wanted = device_map
    elif device_map is None or device_map in ("auto", ""):
        wanted = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    elif isinstance(device_map, int) or str(device_map).split(",")[0].isdigit():
        # An index means "the accelerator of that number, if there is one": the default of 0 must work without any.
        index = int(str(device_map).split(",")[0])
        if torch.cuda.is_available() and index >= torch.cuda.device_count():
            raise ValueError(f"device {index} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
        wanted = torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")
    else:
        try:
            wanted = torch.device(str(device_map).split(",")[0])
        except RuntimeError as error:
            raise ValueError(f"device {device_map!r} is not a device: use cpu, cuda, cuda:1, 0 or auto") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device_map!r} was asked for, but PyTorch sees no CUDA device: use device_map='cpu'")
    return wanted


def several_devices(device_map: Any) -> list[Any]:
    """The devices of "0,1", "cpu,cpu" or a list of two or more; empty for what means a single one.

    Raises:
        ValueError: a device that is not there, or one that is given twice.
    """
    if isinstance(device_map, (list, tuple)):
        names = [str(part) for part in device_map]
    else:
        names = [part.strip() for part in device_map.split(",")] if isinstance(device_map, str) else []
    names = [name for name in names if name]
    if len(names) < 2:
        return []
    for name in names:
        if pick_device(name).type == "cpu" and name != "cpu":
            raise ValueError(f"device {name!r} is not there: PyTorch sees no CUDA device (cpu,cpu makes two ranks)")
        if name != "cpu" and names.count(name) > 1:
            raise ValueError(f"device {name!r} is given twice in {device_map!r}: one rank works on each")
    return names


def device_of_rank(device_map: Any, ranks: Ranks) -> torch.device:
    """Where one of several ranks tunes: its entry of a list, its own accelerator of the machine, or the CPU.

    Raises:
        ValueError: a device that is not there, or fewer of them than ranks on this machine.
    """
    names = several_devices(device_map)
    if names and len(names) != ranks.here:
        raise ValueError(f"device_map={device_map!r} names {len(names)} devices for {ranks.here} ranks on this machine")
    device = pick_device(names[ranks.local] if names else device_map)
    return device if names or device.type == "cpu" or ranks.world == 1 else pick_device(ranks.local)


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent held when it started this process
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 if sys.platform != "darwin" else 1 << 20)


def resident_bytes() -> int:
    """Resident memory of this process now; where the system does not tell, the peak so far."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmRSS:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) << 10 if found else int(peak_memory_mb() * (1 << 20))


def free_memory() -> int | None:
    """Bytes of RAM that can still be had: what the system calls available, within the control group's limit.

    None where neither is known.
    """
    limits = []
    info = Path("/proc/meminfo")
    if info.exists():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", info.read_text(), re.MULTILINE)
        limits += [int(found[1]) << 10] if found else []
    for limit, used in _CGROUPS:
        try:
            most, now = Path(limit).read_text().strip(), int(Path(used).read_text())
        except (OSError, ValueError):
            continue
        if most.isdigit() and int(most) < 1 << 60:  # "max", and a number beyond any memory, stand for no limit
            limits.append(max(0, int(most) - now + _cached(Path(limit).parent / "memory.stat")))
    return min(limits, default=None)


_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _cached(stat: Path) -> int:
    """Bytes of files that a control group counts as used and gives back when memory is wanted."""
    try:
        found = re.search(r"^(?:total_)?inactive_file (\d+)", stat.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


_REFUSALS = ("can't allocate memory", "out of memory", "not enough memory", "Cannot allocate memory", "ALLOC_FAILED")
_PLAIN_ERRORS = (RuntimeError, getattr(torch, "AcceleratorError", RuntimeError))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, one of CUDA's libraries, Python or the system says with this error that memory is refused."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return type(error) in _PLAIN_ERRORS and any(words in str(error) for words in _REFUSALS)


def trim_memory() -> None:
    """Give freed memory back to the system between blocks.

    glibc keeps it otherwise, and with tensors of many sizes the process grows with every block although nothing is
    held (on 40 blocks of 100 MB: by 1 GB).
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent from other C libraries
        if trim is not None:
            trim(0)


def device_peak_mb(device: torch.device) -> float | None:
    """Largest memory allocated on an accelerator so far, in MiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / (1 << 20) if device.type == "cuda" else None
