"""Things that go wrong during a run, made on purpose, and a small run for them to happen to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny, tiny_llama, token_ids

from auto_round import AutoRound
from auto_round.verify.values import file_hashes

BLOCKS = 3
NAME = "tiny-w2g32"
RUN = {
    "scheme": "W2A16G32",
    "nsamples": 8,
    "seqlen": 32,
    "batch_size": 4,
    "iters": 4,
    "lr": 0.03,
    "device_map": "cpu",
    "show_progress": False,
    "seed": 7,
}


def prepare(model: Path, **changes: Any) -> Any:
    return AutoRound(str(model), **{**RUN, "dataset": token_ids(8), **changes})


def quantize(model: Path, out: Path, **changes: Any) -> Path:
    """Start a run, or go on with one; returns the finished folder."""
    return Path(prepare(model, **changes).quantize_and_save(out)[1])


def undisturbed(folder: Path) -> tuple[Path, dict[str, str]]:
    """A model, and the files of a run to which nothing happened."""
    source = save_tiny(tiny_llama(num_hidden_layers=BLOCKS), folder / "tiny")
    return source, content(quantize(source, folder / "out"))


def content(folder: Path) -> dict[str, str]:
    """Hashes of all files of an artifact that do not tell times."""
    return file_hashes(Path(folder))


def complete(out: Path) -> list[Path]:
    """Folders that look like a finished model."""
    found = [file.parent for pattern in ("config.json", "*.gguf") for file in out.rglob(pattern)]
    return [folder for folder in found if not folder.name.endswith((".partial", ".replaced"))]


def leftovers(out: Path) -> list[str]:
    """What a run that could clean up should not have left."""
    kinds = ("*.partial", "*.tmp", "*.activations", "*.replaced", "*.lock", "lock", "*.probe-*")
    return [path.name for kind in kinds for path in out.rglob(kind)]


def nothing_wrong(out: Path) -> bool:
    return complete(out) == [] and leftovers(out) == []


def blocks(out: Path) -> int:
    """Finished blocks in the work folder."""
    return len(list(out.glob("*.work/*/*.safetensors")))


def start(work: Callable[[], Any]) -> int:
    """Do something in a process of its own, which has imported everything already; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        code = work() or 0
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """The exit code of a process, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Failing:
    """Stands in for functions, and lets the n-th call among all of them fail. n=0 counts only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, places: list[tuple[Any, str]], error: Callable[[], Exception]):
        self.calls, self.n, self._error = 0, 0, error
        for owner, name in places:
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, real: Callable) -> Callable:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.n:
                raise self._error()
            return real(*args, **kwargs)

        return called

    @contextmanager
    def at(self, n: int) -> Iterator[None]:
        self.calls, self.n = 0, n
        try:
            yield
        finally:
            self.n = 0
