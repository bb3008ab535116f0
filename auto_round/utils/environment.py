"""What of the machine and the process a result depends on beside its inputs, and how the process was started."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from typing import Any

import torch


def environment(device: torch.device) -> dict[str, Any]:
    """What can change the last bits of a result: interpreter, processor and its instructions, threads, device."""
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        found |= {"device_name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def repeated() -> str:
    """The command that started this process, from the folder that it is in."""
    return f"cd {shlex.quote(os.getcwd())} && {shlex.join(sys.orig_argv)}"
