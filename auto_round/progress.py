"""Progress of a run: a bar with block, loss and time left on a terminal, one log line a block elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from auto_round.logger import logger


class RunProgress:
    """Shows which block is worked on, the loss of its tuning and how long the rest will take."""

    def __init__(self, blocks: int, iters: int, enabled: bool = True):
        console = Console(file=sys.stderr)
        self._live = enabled and console.is_terminal
        self._steps = max(iters, 1)
        self._began = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._total = blocks
        self._blocks = self._bar.add_task("blocks", total=blocks * self._steps, loss="", visible=blocks > 0)

    def __enter__(self) -> RunProgress:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)

    def step(self, number: int, name: str, iteration: int, loss: float) -> None:
        """Iteration `iteration` of block `number` (0-based) is done, its loss being `loss`."""
        done = number * self._steps + iteration
        self._bar.update(self._blocks, completed=done, description=name, loss=f"loss {loss:.3g}")

    def block(self, number: int, name: str, text: str) -> None:
        """A block is finished; `text` says how it went."""
        self._bar.update(self._blocks, completed=(number + 1) * self._steps, description=name, loss="")
        elapsed = time.monotonic() - self._began
        logger.info("[%d/%d] %s: %s (%.0f s so far)", number + 1, self._total, name, text, elapsed)
