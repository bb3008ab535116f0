"""Regular expressions that come from files, searched in layer names without trusting their authors.

A few characters such as `(a+)+$` can keep Python's `re` busy for years, and `(a{9999}){9999}` fills the memory while it
is compiled. Here expressions are limited in size before they are compiled, and in time while they are searched.
"""

from __future__ import annotations

import math
import re
import time

import regex

MAX_LENGTH = 10_000  # characters of an expression
MAX_SIZE = 200_000  # … times the counts in its braces: what a compiler may unroll
MAX_NAME = 2_000  # characters of a name that is searched
ONE_SEARCH = 0.25  # seconds of processor time
ALLOWANCE = 0.5  # seconds for all searches of a `Patterns` together, beside …
PER_SEARCH = 20e-6  # … this much for each; an ordinary one takes a quarter of it

_SIGNS = re.compile(r"[\^$|()\[\]?+*\\]")
_BRANCHES = re.compile(r"[*+?{|]")  # without these there is one way to match, and nothing to time


class PatternError(ValueError):
    """An expression that is invalid, too large or too slow; the message names it."""


def is_expression(pattern: str) -> bool:
    """Whether a pattern has signs of a regular expression; dots alone are taken as parts of a name."""
    return _SIGNS.search(pattern) is not None


class Patterns:
    """Expressions from one place, such as a configuration; what they take together is limited, however many they are.

    Raises (both methods):
        PatternError: see there; `origin` says where the expression stands.
    """

    def __init__(self, origin: str):
        self.origin = origin
        self._left = ALLOWANCE
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def search(self, pattern: str, name: str) -> bool:
        """Whether the expression is found anywhere in the name."""
        return self._try(pattern, name, "search")

    def match(self, pattern: str, name: str) -> bool:
        """Whether the expression is found at the beginning of the name."""
        return self._try(pattern, name, "match")

    def _try(self, pattern: str, name: str, method: str) -> bool:
        find = getattr(self._expression(pattern), method)
        if not _BRANCHES.search(pattern):
            return find(name) is not None
        if len(name) > MAX_NAME:
            raise PatternError(f"{self.origin}: the name {name[:60]!r}… is too long to search ({len(name)} characters)")
        start = time.process_time()
        try:
            found = find(name, timeout=max(1e-4, min(ONE_SEARCH, self._left))) is not None
        except TimeoutError as error:
            raise PatternError(
                f"{self.origin}: the regular expression {_shown(pattern)} takes too long on {name!r}: "
                "write it without repetitions inside repetitions"
            ) from error
        self._left = min(ALLOWANCE, self._left + PER_SEARCH - (time.process_time() - start))
        return found

    def _expression(self, pattern: str) -> regex.Pattern[str]:
        if not isinstance(pattern, str):
            raise PatternError(f"{self.origin}: a layer pattern must be text, not {pattern!r}")
        if pattern not in self._compiled:
            try:
                self._compiled[pattern] = _compile(pattern)
            except PatternError as error:
                raise PatternError(f"{self.origin}: {error}") from error
        return self._compiled[pattern]


def search(pattern: str, name: str, origin: str = "quantization_config") -> bool:
    """Whether one expression is found anywhere in one name; see `Patterns` for many."""
    return Patterns(origin).search(pattern, name)


def match(pattern: str, name: str, origin: str = "quantization_config") -> bool:
    """Whether one expression is found at the beginning of one name; see `Patterns` for many."""
    return Patterns(origin).match(pattern, name)


def _compile(pattern: str) -> regex.Pattern[str]:
    if len(pattern) > MAX_LENGTH or len(pattern) * _largest_count(pattern) > MAX_SIZE:
        raise PatternError(f"the regular expression {_shown(pattern)} is too large: name the layers in shorter ones")
    try:
        return regex.compile(pattern, regex.VERSION0)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else error
        raise PatternError(f"invalid regular expression {_shown(pattern)}: {reason}") from error


def _largest_count(pattern: str) -> int:
    """How often the innermost of nested counted repetitions may run, if all those of a pattern were nested."""
    counts = (re.findall(r"\d{1,9}", braces) for braces in re.findall(r"\{[^{}]*\}", pattern))
    return math.prod(max(map(int, found)) for found in counts if found) or 1


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "…")
