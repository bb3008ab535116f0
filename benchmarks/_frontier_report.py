"""Tables and pictures of the frontier's results.

A point is one recipe of one implementation on one row and model: the mean over its seeds, and how far they spread.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Record = dict[str, Any]

HEADER = (
    "model",
    "row",
    "quantizer",
    "recipe",
    "seeds",
    "KL",
    "perplexity",
    "CPU s",
    "peak MiB",
    "KL / base",
    "CPU / base",
)
PANEL = (3.2, 2.6)
MARKS = "osD^v"


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a figure over seeds; the deviation of one seed is zero."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Over the values of all seeds."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else 0.0)

    def text(self, digits: int) -> str:
        """The mean, and the deviation if there is one."""
        beside = f" ± {self.deviation:.{digits}f}" if self.deviation else ""
        return f"{self.mean:.{digits}f}{beside}"


@dataclass(frozen=True)
class Point:
    """A recipe of an implementation on one row and model."""

    model: str
    row: str
    tag: str
    recipe: str
    seeds: int
    kl: Spread
    ppl: Spread
    seconds: Spread
    peak: float

    @property
    def method(self) -> str:
        """What ratios are taken to is named like this."""
        return f"{self.tag}/{self.recipe}"


def points(records: list[Record]) -> list[Point]:
    """The records of each recipe put together, in the order in which they first come."""
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[record["model"], record["row"], record["tag"], record["recipe"]].append(record)
    return [
        Point(
            *names,
            len(group),
            *(Spread.of([record[figure] for record in group]) for figure in ("kl", "ppl", "cpu_s")),
            max(max(record["peak_rss_mb"], record["child_peak_rss_mb"]) for record in group),
        )
        for names, group in groups.items()
    ]


def table(records: list[Record], baseline: str) -> str:
    """Markdown: a line for each point, and its KL and processor time in proportion to the baseline's."""
    found = points(records)
    base = {(point.model, point.row): point for point in found if point.method == baseline}
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for point in sorted(found, key=lambda point: point.model):
        other = base.get((point.model, point.row))
        ratios = ["", ""]
        if other is not None:
            ratios = [f"{point.kl.mean / other.kl.mean:.2f}", f"{point.seconds.mean / other.seconds.mean:.2f}"]
        cells = [point.model, point.row, point.tag, point.recipe, str(point.seeds), point.kl.text(5)]
        cells += [point.ppl.text(3), point.seconds.text(0), f"{point.peak:.0f}", *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(records: list[Record], file: Path) -> None:
    """Draw KL against processor seconds, both logarithmic: a panel for each row (down) and model (across).

    Raises:
        SystemExit: matplotlib is not installed, or there is nothing to draw.
    """
    found = points(records)
    if not found:
        raise SystemExit("--plot: the results hold nothing of what was asked for")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from error

    rows, models = (list(dict.fromkeys(getattr(p, name) for p in found)) for name in ("row", "model"))
    tags = sorted({point.tag for point in found}, key=lambda tag: (tag != "ours", tag))
    sheet = Figure(figsize=(PANEL[0] * len(models), PANEL[1] * len(rows) + 0.5), layout="constrained")
    panels = sheet.subplots(len(rows), len(models), squeeze=False)
    for (i, row), (j, model) in ((a, b) for a in enumerate(rows) for b in enumerate(models)):
        draw(panels[i][j], [point for point in found if (point.row, point.model) == (row, model)], tags)
        panels[i][j].set_title(f"{row}, {model}", fontsize=9)
    lines = {line.get_label(): line for panel in panels.flat for line in panel.get_lines() if line.get_label() in tags}
    sheet.legend([lines[tag] for tag in tags], tags, loc="outside upper center", ncols=len(tags), fontsize=8)
    sheet.supxlabel("processor seconds", fontsize=9)
    sheet.supylabel("KL divergence from the original, nats per token", fontsize=9)
    sheet.savefig(file)


def draw(panel: Any, shown: list[Point], tags: list[str]) -> None:
    """The points of one panel: a line for each implementation, its recipes in the order of their time."""
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.grid(True, which="both", alpha=0.2)
    panel.tick_params(which="both", labelsize=6)
    for number, tag in enumerate(tags):
        mine = sorted((point for point in shown if point.tag == tag), key=lambda point: point.seconds.mean)
        if not mine:
            continue
        across, up = [point.seconds.mean for point in mine], [point.kl.mean for point in mine]
        errors = [point.kl.deviation for point in mine]
        (line,) = panel.plot(across, up, color=f"C{number}", marker=MARKS[number], markersize=4, linewidth=1, label=tag)
        panel.errorbar(across, up, yerr=errors, fmt="none", ecolor=line.get_color(), elinewidth=1, capsize=2)
        for point in mine:
            place = (point.seconds.mean, point.kl.mean)
            panel.annotate(point.recipe, place, xytext=(3, 3), textcoords="offset points", fontsize=6)
