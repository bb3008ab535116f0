"""A budget of wall time: of a ladder of settings in order of measured quality, the best whose estimate fits is taken.

It is the estimate that `plan` shows, put right by what earlier runs in the same output folder tell of its error. How
fast a machine is differs from one moment to the next, so what was picked is kept in the work folder: the same command
goes on with the same settings.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auto_round.compressors.afford import allowed, estimate_run, problems, resources, work_of
from auto_round.compressors.distill import obstacle
from auto_round.earlier import earlier_runs
from auto_round.formats.writer import write_json
from auto_round.logger import logger
from auto_round.modeling.reading import CheckpointError, read_json
from auto_round.report import seconds
from auto_round.settings import SettingsError, TuneSettings
from auto_round.store import fingerprint

if TYPE_CHECKING:
    from auto_round.compressors.base import Compressor

SHARE = 0.9  # of the budget that an estimate may claim: reading data and models is in no estimate
KEPT = "minutes.json"  # in the work folder: what was picked there
_DECIDED = ("iters", "scale_iters", "disable_opt_rtn", "enable_opt_rtn")


@dataclass(frozen=True)
class Point:
    """Settings that the budget decides on; names are those of `TuneSettings`."""

    iters: int
    scale_iters: int = 0
    search: bool = True

    def of(self, tune: TuneSettings) -> TuneSettings:
        return dataclasses.replace(tune, iters=self.iters, scale_iters=self.scale_iters, search=self.search)

    def arguments(self) -> dict[str, Any]:
        """The arguments of `AutoRound` that ask for it."""
        changed = {"scale_iters": self.scale_iters} if self.scale_iters else {}
        return {"iters": self.iters, **changed, **({} if self.search else {"disable_opt_rtn": True})}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.arguments().items())


# In order of measured quality, as benchmarks/README.md has it.
LADDER = (
    Point(0, search=False),
    Point(0),
    Point(25),
    Point(50),
    Point(100),
    Point(100, 40),
    Point(200),
    Point(200, 60),
    Point(400, 100),
    Point(1000, 100),
)


@dataclass(frozen=True)
class Pick:
    """What was picked for a budget of so many minutes, and the seconds that it is expected to take.

    key: what the pick depends on. beyond, beyond_seconds: the next better point, which was left out; None at the top.
    """

    key: str
    minutes: float
    point: Point
    seconds: float
    beyond: str | None = None
    beyond_seconds: float | None = None

    def __str__(self) -> str:
        text = f"minutes={self.minutes:g}: {self.point}, about {seconds(self.seconds)} by the estimate"
        return f"{text} ({self.beyond}: {seconds(self.beyond_seconds)})" if self.beyond is not None else text

    def describe(self) -> dict[str, Any]:
        """Plain values, for the report."""
        return {**dataclasses.asdict(self), "picked": self.point.arguments(), "words": str(self)}


def asked_minutes(given: Mapping[str, Any]) -> float | None:
    """The budget among the arguments of `AutoRound`; None where there is none.

    Raises:
        SettingsError: it is no positive number, or the settings that it decides on were given, too.
    """
    minutes = given.get("minutes")
    if minutes is None:
        return None
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 < minutes < math.inf:
        raise SettingsError(f"minutes={minutes!r} must be a positive number, such as 30 or 0.5")
    both = [name for name in _DECIDED if given.get(name) is not None]
    named = given.get("algorithm") or given.get("alg_configs")
    both += ["algorithm"] if str(named).strip().lower() == "rtn" else []
    if both:
        raise SettingsError(
            f"minutes={minutes:g} and {both[0]}={given.get(both[0], named)!r} contradict each other, as a budget of "
            "time picks such settings itself: give one of them"
        )
    return float(minutes)


def settle(run: Compressor, output: Mapping[str, int], folder: Path | None, root: Path | None = None) -> None:
    """Give a run that has a budget of time its settings, unless it has them; all ranks get those of the main one.

    Args:
        output: format → bytes of the weights that it will write. folder: where reports of earlier runs lie; None
            for nowhere. root: the work folder, which need not exist; None where no earlier pick counts.

    Raises:
        SettingsError: not even rounding to nearest fits the budget.
    """
    if run.minutes is None or run.pick is not None:
        return
    found = _decide(run, output, folder, root) if run.ranks.main else None
    text = run.ranks.everyone(json.dumps(dataclasses.asdict(found) if found else None).encode())[0]
    pick = _pick(json.loads(text))
    run.retune(pick.point.of(run.tune))
    run.take_pick(pick)


def keep(pick: Pick | None, root: Path) -> None:
    """Write down in the work folder what was picked, beside what was picked for other budgets."""
    if pick is None:
        return
    kept = _kept(root)
    if kept.get(pick.key) != dataclasses.asdict(pick):
        write_json(root / KEPT, {**kept, pick.key: dataclasses.asdict(pick)})


def _decide(run: Compressor, output: Mapping[str, int], folder: Path | None, root: Path | None) -> Pick:
    """What an earlier run of the same arguments took; else the best point that fits."""
    key, known = "", None
    if root is not None:
        key = _key(run)
        known = _kept(root).get(key)
    if known is not None:
        pick = _pick(known)
        logger.info("picked by an earlier run in %s, and taken again: %s", root, pick)
        return pick
    pick = _best(run, output, folder, key)
    logger.info("picked %s", pick)
    return pick


def _best(run: Compressor, output: Mapping[str, int], folder: Path | None, key: str) -> Pick:
    error = earlier_runs(folder).time if folder is not None else None
    spent = run.times.get("choose", 0.0)
    beyond, least = None, None
    for point, estimated, fits in _tried(run, output, folder or Path()):
        beyond, least = least, (point, estimated / (1 + (error or 0.0)))
        if least[1] <= 60 * run.minutes * SHARE - spent and (fits or point == LADDER[0]):
            return Pick(key, run.minutes, *least, *((str(beyond[0]), beyond[1]) if beyond else ()))
    raise SettingsError(
        f"minutes={run.minutes:g} is too little: rounding to nearest without data, the quickest way, takes about "
        f"{seconds(least[1])} by the estimate, and a tenth of the budget is left free for what is in no estimate: give "
        f"minutes={_enough((least[1] + spent) / SHARE):g} or more"
    )


def _enough(wanted: float) -> float:
    """So many seconds as minutes, rounded up to what people write: whole ones, hundredths below one."""
    steps = 100 if wanted < 60 else 1
    return math.ceil(wanted / 60 * steps) / steps


def _tried(run: Compressor, output: Mapping[str, int], folder: Path) -> Iterator[tuple[Point, float, bool]]:
    """(point, estimated seconds, whether there is enough memory), the best first; the run's settings are given back.

    What depends on the memory that is free now is decided for each point, as it would be for the run.
    """
    tune = run.tune
    there = allowed(run, resources(folder, run.device))
    possible = obstacle(run.streamed, run.plan) is None
    try:
        for point in reversed(LADDER):
            if point.scale_iters and not possible:
                continue
            run.retune(point.of(tune))
            work = work_of(run)
            found = estimate_run(run, work, output)
            yield point, found.total_seconds, not problems(run, work, found, there)[0]
    finally:
        run.retune(tune)


# ---- what is kept ------------------------------------------------------------------------------------------------


def _key(run: Compressor) -> str:
    """A hash of what a pick depends on: what the result does, without the text, which is not read yet, and a budget."""
    facts = {name: value for name, value in run.facts().items() if name != "data"}
    wanted = run.calibration
    return fingerprint({**facts, "minutes": run.minutes, "nsamples": wanted.nsamples, "seqlen": wanted.seqlen})


def _kept(root: Path) -> dict[str, Any]:
    """Key → pick of earlier runs; a file that cannot be read is as good as none."""
    if not (root / KEPT).exists():
        return {}
    try:
        found = read_json(root / KEPT)
        for entry in found.values():
            _pick(entry)
    except (CheckpointError, OSError, TypeError, ValueError, KeyError) as error:
        logger.warning("%s is damaged (%s): settings for the budget of minutes are picked anew", root / KEPT, error)
        return {}
    return found


def _pick(plain: Mapping[str, Any]) -> Pick:
    return Pick(**{**plain, "point": Point(**plain["point"])})
