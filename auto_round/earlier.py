"""How far estimates of earlier runs were off, read from the reports that lie in an output folder.

The error is the estimate over what was measured, less one. Nothing is remembered elsewhere: a folder without reports
tells nothing, and deleting the reports forgets them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.report import total_seconds

MOST = 20  # newest reports that are read: those of large models are megabytes


@dataclass(frozen=True)
class Earlier:
    """Median errors of earlier runs' estimates: of RAM, of an accelerator's memory, of time; None where none tells."""

    runs: int
    memory: float | None = None
    device: float | None = None
    time: float | None = None

    def words(self) -> str:
        """`memory +4 %, time -12 % (3 runs)`; empty without runs."""
        found = {"memory": self.memory, "device memory": self.device, "time": self.time}
        parts = [f"{name} {error:+.0%}".replace("%", " %") for name, error in found.items() if error is not None]
        return f"{', '.join(parts)} ({self.runs} run{'s' if self.runs > 1 else ''})" if parts else ""


def earlier_runs(folder: Path) -> Earlier:
    """What the reports in an output folder tell. Reports that cannot be read, or lack an estimate, are passed over."""
    found = [errors for report in _reports(folder) if (errors := _errors(report))]
    medians = {}
    for what in ("memory", "device", "time"):
        values = [errors[what] for errors in found if what in errors]
        medians[what] = statistics.median(values) if values else None
    return Earlier(len(found), **medians)


def _reports(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The newest report of every run: one that wrote several formats has a report in each of their folders."""
    files = [file for pattern in ("*/report.json", "*/*/report.json") for file in folder.glob(pattern)]
    files = [file for file in files if not file.parent.name.endswith((".partial", ".old"))]
    known: set[str] = set()
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)[:MOST]:
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(report, dict) and (run := str(report.get("work_folder"))) not in known:
            known.add(run)
            yield report


def _errors(report: Mapping[str, Any]) -> dict[str, float]:
    """Errors of one run. Time tells nothing of a run that went on from an earlier one, or wrote several formats."""
    try:
        estimate, found = report["estimate"], {}
        found["memory"] = estimate["ram"]["total"] / (report["peak_memory_mb"] * (1 << 20)) - 1
        if estimate["vram"] and report["device_peak_mb"]:
            found["device"] = estimate["vram"]["total"] / (report["device_peak_mb"] * (1 << 20)) - 1
        whole = len(estimate["disk"]["output"]) == 1 and not any(block["resumed"] for block in report["blocks"])
        if whole and estimate["total_seconds"]:
            found["time"] = estimate["total_seconds"] / total_seconds(report["times"]) - 1
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        return {}
    return found
