"""One process for each of several devices of this machine, started by PyTorch's own launcher.

Every process runs the same command; what they have found is in the folder that the first of them has written. Ranks on
several machines are started by torchrun itself.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from auto_round.cli.parser import UsageError

KEPT = "finished blocks are kept, and the same command goes on from them"


def is_rank() -> bool:
    """Whether this process was started as one of several, by torchrun, accelerate or `launch`."""
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ


def launch(arguments: Sequence[str], devices: Sequence[str]) -> int:
    """Run `auto-round quantize ARGUMENTS` in a process for each device; the exit code of the one that failed first.

    Raises:
        UsageError: a device that is not there.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from auto_round.utils.device import several_devices

    try:
        several_devices(",".join(devices))
    except ValueError as error:
        raise UsageError(str(error)) from error
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // len(devices))))
    if "--debug" not in arguments:
        logging.getLogger("torch.distributed.elastic").setLevel(
            logging.CRITICAL
        )  # it tells in its terms what ranks say
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=len(devices),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "auto_round", "quantize", *arguments)
    except ChildFailedError as error:
        return _explain(error.failures)
    except SignalException as stop:
        print(f"auto-round: ended by {signal.Signals(stop.sigval).name}; {KEPT}", file=sys.stderr)
        return 128 + int(stop.sigval)
    return 0


def _explain(failures: Mapping[int, Any]) -> int:
    """Say what no process could say of itself. failures: rank → how it ended."""
    killed = {rank: -one.exitcode for rank, one in failures.items() if one.exitcode < 0}
    first = min(failures.values(), key=lambda one: one.timestamp)
    for rank, number in killed.items():
        if number != signal.SIGTERM:  # which the launcher sends to the others
            print(f"auto-round: rank {rank} was ended by {signal.Signals(number).name}; {KEPT}", file=sys.stderr)
    return first.exitcode if first.exitcode > 0 else 1
