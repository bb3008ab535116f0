"""Runs that are killed, or lose disk or memory, at random moments; then gone on with until they finish.

Every artifact must have the bytes of an undisturbed run, no folder in between may look like a finished model unless it
is one, and no finished block may be done twice. Each run is a fork of a process that has imported everything, so a
kill costs no more than the run itself.

    OMP_NUM_THREADS=1 python benchmarks/faults.py --model FOLDER --dataset FILE --folder DIR [--kills 100] [--disk 20]
        [--memory 20] [--seed 0] [--options "--iters 5 …"]
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import auto_round.autoround
import auto_round.cli.quantize
import auto_round.cli.summary  # noqa: F401 - imported once, before the forks
from auto_round import store
from auto_round.cli.main import main as command
from auto_round.formats import writer
from auto_round.verify.values import file_hashes

OPTIONS = "--scheme W4A16 --iters 5 --lr 0.02 --nsamples 16 --seqlen 256 --device_map cpu"
WRITES = [(os, "write"), (os, "pwrite"), (os, "fsync"), (os, "replace"), (writer.json, "dump"), (store, "save_file")]
WRITES += [(shutil, "copyfile"), (Path, "write_text"), (Path, "mkdir"), (Path, "rename")]


@dataclass
class Tally:
    """What came of one kind of mishap. hit: how often it happened before the run ended."""

    tried: int = 0
    hit: int = 0
    identical: int = 0
    looked_complete: int = 0
    lost_blocks: int = 0
    ends: Counter = field(default_factory=Counter)
    stages: Counter = field(default_factory=Counter)

    def row(self, name: str) -> str:
        ends = ", ".join(f"{count} × {end}" for end, count in sorted(self.ends.items()))
        stages = ", ".join(f"{stage} {count}" for stage, count in self.stages.items() if count)
        return (
            f"| {name} | {self.tried} | {self.hit} | {self.identical} | {self.looked_complete} | {self.lost_blocks} "
            f"| {ends} | {stages} |"
        )


class Trial:
    """One output folder, its runs, and the bytes that it must end with."""

    def __init__(self, out: Path, line: list[str], want: dict[str, str], tally: Tally):
        self.out, self.line, self.want, self.tally = out, line, want, tally
        tally.tried += 1

    def run(self, before: Callable[[], None] = lambda: None, kill_after: float = float("inf")) -> int:
        """Start a run, or go on with it; returns its exit code, or minus the signal that ended it.

        kill_after: seconds of processor time, which does not depend on what else the machine does.
        """
        self.blocks = self._blocks()
        child = os.fork()
        if not child:
            self._work(before)
        while True:
            done, status, used = os.wait4(child, os.WNOHANG)
            if done:
                self.seconds = used.ru_utime + used.ru_stime
                return os.waitstatus_to_exitcode(status)
            if processor_time(child) > kill_after:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.001)

    def _work(self, before: Callable[[], None]) -> None:
        code = 70
        try:
            log = open(self.out.parent / "log", "a", buffering=1)  # noqa: SIM115 - it lives as long as this process
            sys.stdout = sys.stderr = log
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            before()
            code = command([*self.line, "--output_dir", str(self.out)])
            (self.out.parent / "modules").write_text("\n".join(sys.modules))
        finally:
            os._exit(code)

    def note(self, code: int) -> None:
        """Look at what a run that did not finish has left."""
        self.tally.hit += 1
        self.tally.ends[f"signal {-code}" if code < 0 else f"exit {code}"] += 1
        self.tally.stages[self._stage()] += 1
        looks = [
            p.parent for p in self.out.rglob("config.json") if not p.parent.name.endswith((".partial", ".replaced"))
        ]
        self.tally.looked_complete += sum(file_hashes(folder) != self.want for folder in looks)

    def _stage(self) -> str:
        if any(self.out.glob("*/report.json")) and not any(self.out.glob("*.partial")):
            return "published"
        partial = next(self.out.glob("*.partial"), None)
        if partial is not None:
            return "verifying" if (partial / "config.json").exists() else "exporting"
        return "with finished blocks" if self._blocks() else "before the first block"

    def _blocks(self) -> int:
        return len(list(self.out.glob("*.work/*/*.safetensors")))

    def finish(self) -> None:
        """Compare with the undisturbed run."""
        folder = next((path.parent for path in self.out.glob("*/report.json")), None)
        if folder is not None:
            self.tally.identical += file_hashes(folder) == self.want
            report = json.loads((folder / "report.json").read_text())
            self.tally.lost_blocks += max(0, self.blocks - sum(block["resumed"] for block in report["blocks"]))
        shutil.rmtree(self.out, ignore_errors=True)


class Failing:
    """Lets the n-th of all calls that write fail as a full disk does; counts them if n is 0."""

    def __init__(self, n: int, count: Path | None = None):
        self._n, self._count, self._calls = n, count, 0

    def __call__(self) -> None:
        for owner, name in WRITES:
            setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, real: Callable) -> Callable:
        def called(*args, **kwargs):
            self._calls += 1
            if self._calls == self._n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            result = real(*args, **kwargs)
            if self._count is not None:
                with open(self._count, "w") as file:
                    file.write(str(self._calls))
            return result

        return called


def starve(after: float, room: int) -> None:
    """After so many seconds of processor time, let the process grow by no more than `room` bytes."""

    def limit(*_) -> None:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + room, resource.RLIM_INFINITY))

    signal.signal(signal.SIGPROF, limit)
    signal.setitimer(signal.ITIMER_PROF, after)


def processor_time(process: int) -> float:
    """Seconds that a running process has computed, in steps of a hundredth."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def trials(count: int, options: argparse.Namespace, want: dict[str, str], tally: Tally) -> Iterator[Trial]:
    for number in range(count):
        trial = Trial(options.folder / "out", options.line, want, tally)
        yield trial
        trial.finish()
        if (number + 1) % 10 == 0:
            print(f"  {number + 1}/{count}: {tally}", file=sys.stderr, flush=True)


def kills(count: int, options: argparse.Namespace, want: dict[str, str], seconds: float, draw: random.Random) -> Tally:
    """Kill at any moment; then go on, and kill again with a probability of a half, until a run finishes."""
    tally = Tally()
    for trial in trials(count, options, want, tally):
        while True:
            again = draw.random() < 0.5 or not trial.out.exists()
            code = trial.run(kill_after=draw.uniform(0, seconds) if again else float("inf"))
            if code == 0:
                break
            trial.note(code)
    return tally


def full_disks(count: int, options: argparse.Namespace, want: dict[str, str], calls: int, draw: random.Random) -> Tally:
    """Every other one a call that fails, the others a disk of memory of a random size, if one can be mounted."""
    tally = Tally()
    for trial in trials(count, options, want, tally):
        if tally.tried % 2 == 0 and mounted(trial.out, draw.randrange(options.needed)):
            code = trial.run()
            if code:
                trial.note(code)
                subprocess.run(["mount", "-o", f"remount,size={4 * options.needed}", trial.out], check=True)
                trial.run()
            kept = shutil.copytree(trial.out, trial.out.with_name("copy"))
            subprocess.run(["umount", trial.out], check=True)
            shutil.rmtree(trial.out)
            kept.rename(trial.out)
            continue
        code = trial.run(Failing(draw.randrange(calls) + 1))
        if code:
            trial.note(code)
            trial.run()
    return tally


def mounted(folder: Path, nbytes: int) -> bool:
    folder.mkdir(exist_ok=True)
    size = max(4096, nbytes)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    return done.returncode == 0


def starved(
    count: int, options: argparse.Namespace, want: dict[str, str], seconds: float, draw: random.Random
) -> Tally:
    tally = Tally()
    for trial in trials(count, options, want, tally):
        after, room = draw.uniform(0.01, seconds * 0.9), draw.randrange(1 << 22)
        code = trial.run(lambda after=after, room=room: starve(after, room))
        if code:
            trial.note(code)
            trial.run()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the runs; emptied first")
    for name, count in (("kills", 100), ("disk", 20), ("memory", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--options", default=OPTIONS)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    options.line = [options.model, "--dataset", options.dataset, *shlex.split(options.options)]
    torch.set_num_threads(1)
    draw = random.Random(options.seed)

    first = Trial(options.folder / "whole", options.line, {}, Tally())
    if first.run(Failing(0, options.folder / "calls")):
        sys.exit(f"the undisturbed run failed: see {options.folder / 'log'}")
    for name in (options.folder / "modules").read_text().split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    calls = int((options.folder / "calls").read_text())
    options.needed = sum(file.stat().st_size for file in first.out.rglob("*") if file.is_file())
    want = file_hashes(next(first.out.glob("*/report.json")).parent)
    shutil.rmtree(first.out)
    first.run()
    seconds = first.seconds
    print(
        f"undisturbed: {seconds:.1f} s of processor time, {calls} calls that write, {options.needed >> 10} KiB\n",
        flush=True,
    )
    rows = {
        "killed": kills(options.kills, options, want, seconds, draw),
        "disk full": full_disks(options.disk, options, want, calls, draw),
        "allocation failed": starved(options.memory, options, want, seconds, draw),
    }
    print(
        "| mishap | runs | happened | identical artifacts | wrong but complete in looks | blocks lost | ends | when |"
    )
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(tally.row(name) for name, tally in rows.items()))
    bad = [name for name, t in rows.items() if t.identical != t.tried or t.looked_complete or t.lost_blocks]
    sys.exit(f"failed: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
