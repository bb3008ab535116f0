"""Files that somebody else wrote, read without trusting them.

JSON is taken only if it is a mapping of a sane size and depth. A path must stay in its folder. What a library raises on
a file's content becomes an error that names the file, so that a damaged download does not look like a bug.
"""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_JSON = 256 << 20  # bytes; the index of the largest published model has a tenth of that
MAX_DEPTH = 64  # of mappings and lists within each other
MAX_SHOWN = 500  # characters of another library's message
UNTRUSTED = (
    "brings its own code, which is not run unless you trust it: "
    "read it, then pass trust_remote_code=True (--trust_remote_code)"
)
AGAIN = "download the model again, or export it again"


class CheckpointError(ValueError):
    """A model directory that cannot be read; the message names the file and what to do."""


def read_json(file: Path) -> dict[str, Any]:
    """The settings in a file.

    Raises:
        CheckpointError: it is no regular file, no JSON in UTF-8, too large, too deep, or no mapping.
    """
    try:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, or no file: {AGAIN}")
        if file.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{file} is larger than {MAX_JSON >> 20} MiB, which no such file is: {AGAIN}")
        value = json.loads(file.read_bytes().decode("utf-8"))
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{file} is nested too deeply: {AGAIN}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}): {AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds {kind_of(value)}, not settings: {AGAIN}")
    if _is_deeper(value, MAX_DEPTH):
        raise CheckpointError(f"{file} is nested deeper than {MAX_DEPTH} levels: {AGAIN}")
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def kind_of(value: Any) -> str:
    """A value's type, and the beginning of it, for messages."""
    return f"{type(value).__name__} ({str(value)[:40]})"


@contextlib.contextmanager
def reading(what: str | Path, remedy: str = AGAIN, keep: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Name the file in whatever is raised on its content.

    keep: types of errors that say enough as they are, as a CheckpointError does.

    Raises:
        CheckpointError: something else was raised inside.
    """
    try:
        yield
    except (CheckpointError, MemoryError, *keep):
        raise
    except Exception as error:
        raise CheckpointError(_sentence(what, error, remedy)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what libraries in Rust raise, and which is no Exception
            raise
        raise CheckpointError(_sentence(what, error, remedy)) from error


def _sentence(what: str | Path, error: BaseException, remedy: str) -> str:
    if "trust_remote_code" in str(error):
        return f"{what} {UNTRUSTED}"
    if type(error).__module__.startswith("auto_round.") or (type(error) is ValueError and _is_ours(error)):
        return f"{what}: {error}"  # written for people
    return f"{what} cannot be used ({describe(error)}): {remedy}"


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised by this package's own code."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].startswith("auto_round.")


def describe(error: BaseException) -> str:
    """An error of another library in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + " …"


def stays_inside(file: Path, folder: Path) -> bool:
    """Whether a file, links followed, lies in its folder; the blobs beside a snapshot of the hub's cache belong to it.

    A snapshot is `models--NAME/snapshots/REVISION`, its files are links into `models--NAME/blobs`. A link in the folder
    to a safetensors file may lead anywhere: people share large weights so, and they are only ever read as tensors.
    """
    target, home = file.resolve(), folder.resolve()
    weights = file.suffix == target.suffix == ".safetensors" and target.is_file()
    if weights and file.is_symlink() and file.parent.resolve().is_relative_to(home):
        return True
    blobs = [above.parent / "blobs" for above in (home, *home.parents) if above.name == "snapshots"]
    return any(target.is_relative_to(allowed.resolve()) for allowed in (home, *blobs))


def check_links(folder: Path) -> None:
    """Refuse a folder with links that lead out of it: what they show would be read, and copied to the output.

    Raises:
        CheckpointError: names the link.
    """
    for place, folders, files in os.walk(folder):
        for entry in (Path(place) / name for name in (*folders, *files)):
            if entry.is_symlink() and not stays_inside(entry, folder):
                raise CheckpointError(
                    f"{entry} is a link out of its folder, to {entry.resolve()}: put what it shows into the folder"
                )
