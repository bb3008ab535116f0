"""Damages of files, drawn by hypothesis, and the watch under which a damaged folder is used.

A watched call must end in time, allocate little, write nothing outside its output, and either succeed or raise an error
that is meant for people: of a type of this package, ValueError or OSError, that names the folder or file.
"""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

SECONDS = 30
EXTRA_MEMORY = 6 << 30  # bytes of address space beside what the process has
HUGE = 10**15
NAMED = (
    "tokenizer",
    "alibration data",
    "model.layers.0",
    "he original model gives",
    "The model gives",
)  # what else an error may be about
OWN = ("run.json", "lock")  # what a run that opens a work folder touches


class Hang(BaseException):
    """Passes every `except Exception`."""


class Unclear(AssertionError):
    """An error that does not tell a person what happened to which file."""


# ---- values ------------------------------------------------------------------------------------------------------

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 3, 2**31, 2**63, HUGE, -HUGE, 1e308, float("nan"), float("inf"), -0.5]),
    st.sampled_from(["", "../../x", "/etc/passwd", "(a|a)*$", "\x00", "é" * 50, "x" * 5000, "NaN", "org/kernel"]),
    st.sampled_from([[], {}, [[]], [None], {"": None}, {"a": {"b": {"c": [1, "x"]}}}, [1, 2, 3], ["a"], [{}]]),
)


def paths_of(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where values stand within a value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


@st.composite
def changed(draw: Callable, value: Any, most: int = 3) -> Any:
    """A copy in which a few entries are dropped, replaced, multiplied, negated or wrapped."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, most))):
        paths = list(paths_of(value))
        if not paths:
            return value
        *way, key = draw(st.sampled_from(paths))
        holder = value
        for step in way:
            holder = holder[step]
        kind = draw(st.sampled_from(["drop", "odd", "odd", "odd", "scale", "wrap", "text", "add"]))
        if kind == "drop":
            del holder[key]
        elif kind == "scale" and isinstance(holder[key], (int, float)):
            holder[key] = holder[key] * draw(st.sampled_from([-1, 2, 0.5, 1000, 10**9]))
        elif kind == "wrap":
            holder[key] = draw(st.sampled_from([[holder[key]], {"x": holder[key]}]))
        elif kind == "text":
            holder[key] = str(holder[key])
        elif kind == "add" and isinstance(holder[key], dict):
            holder[key]["added"] = copy.deepcopy(draw(ODD))
        else:
            holder[key] = copy.deepcopy(draw(ODD))  # its lists are shared
    return value


@st.composite
def json_bytes(draw: Callable, value: Any) -> bytes:
    """The text of a changed value, or a text that is no such JSON at all."""
    kind = draw(st.sampled_from(["value"] * 8 + ["cut", "bom", "latin", "empty", "array", "deep", "twice", "digits"]))
    text = json.dumps(draw(changed(value)) if kind == "value" else value).encode()
    return {
        "value": text,
        "cut": text[: len(text) // 2],
        "bom": b"\xef\xbb\xbf" + text,
        "latin": text.replace(b'"', b'"\xe9', 1),
        "empty": b"",
        "array": b"[" + text + b"]",
        "deep": b'{"a":' * 5000 + text + b"}" * 5000,
        "twice": text[:-1] + b"," + text[1:],
        "digits": text[:-1] + b', "a": ' + b"9" * 5000 + b"}",
    }[kind]


@st.composite
def safetensors_bytes(draw: Callable, original: bytes) -> bytes:
    """A safetensors file with a header that lies."""
    length = struct.unpack("<Q", original[:8])[0]
    header, body = json.loads(original[8 : 8 + length]), original[8 + length :]
    kind = draw(st.sampled_from(["header"] * 6 + ["length", "cut", "twice", "garbage", "entry"]))
    if kind == "length":
        return struct.pack("<Q", draw(st.sampled_from([0, 1, 2, 10**6, 99_999_999, 2**40, 2**64 - 1]))) + original[8:]
    if kind == "cut":
        return original[: draw(st.integers(0, len(original) - 1))]
    if kind == "entry":
        name = draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
        begin = draw(st.sampled_from([0, 8, -8, len(body), 2**62, 2**64]))
        sizes = st.lists(st.sampled_from([0, 1, 2, 64, -1, 2**31, 2**63, 2**64]), max_size=4)
        size = draw(st.sampled_from([0, 4, 1 << 14, 2**40, 2**64]))
        dtype = draw(st.sampled_from(["F32", "BF16", "F4", "U64", "X", "I8", "C64"]))
        header[name] = {"dtype": dtype, "shape": draw(sizes), "data_offsets": [begin, begin + size]}
    if kind == "header":
        header = draw(changed(header))
    text = json.dumps(header).encode()
    if kind == "twice":
        text = text[:-1] + b"," + text[1:]
    if kind == "garbage":
        text = draw(st.binary(min_size=2, max_size=200))
    return struct.pack("<Q", len(text)) + text + body


@st.composite
def damaged_bytes(draw: Callable, original: bytes) -> bytes:
    """A binary file cut, or with some bytes overwritten (mostly in its first kilobyte, where headers are)."""
    if draw(st.booleans()):
        return original[: draw(st.integers(0, len(original)))]
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        patch = draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8), st.just(b"\x00" * 8)))
        start = draw(st.integers(0, min(len(data), 1024) - 1))
        data[start : start + len(patch)] = patch
    return bytes(data)


# ---- the watch ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(seconds: float = SECONDS, memory: int = EXTRA_MEMORY) -> Iterator[None]:
    """A limit on wall-clock time and on further address space."""

    def late(*_: Any) -> None:
        raise Hang(f"longer than {seconds} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages + memory, before[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file of a folder."""
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*") if not p.is_dir()}


def check_clear(error: BaseException, folder: Path) -> None:
    """Raise Unclear unless the error says in words what is wrong with which file."""
    chain, cause = [], error
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    large = next((e for e in chain if isinstance(e, MemoryError) or "allocate" in str(e)), None)
    if large is not None:
        raise Unclear(f"a large allocation was tried: {large}") from error
    kind = type(error)
    if not (kind.__module__.startswith("auto_round.") or kind in (ValueError, OSError, FileNotFoundError)):
        raise Unclear(f"{kind.__name__}: {error}") from error
    if not any(name in str(error) for name in (folder.name, *NAMED)):
        raise Unclear(f"names no file: {kind.__name__}: {error}") from error


def watched(use: Callable[[], Any], folder: Path, **limits: Any) -> BaseException | None:
    """Use a folder whose files are damaged; returns the clear error, or None if it worked all the same.

    Nothing may change in the folder's parent but inside folders called `out…`.
    """
    before, error = listing(folder.parent), None
    try:
        with limited(**limits):
            use()
    except Exception as raised:
        error = raised
    after = listing(folder.parent)
    touched = {Path(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    outside = [path for path in touched if path.name not in OWN and not _is_output(path.relative_to(folder.parent))]
    assert not outside, f"files were written: {outside}"
    if error is not None:
        check_clear(error, folder)
    return error


def _is_output(path: Path) -> bool:
    return path.parts[0].startswith("out")
