"""What the sub-commands' parsers share: errors of one sentence, near misses of mistyped options, lenient values.

Nothing here imports torch, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

PROG = "auto-round"


class UsageError(Exception):
    """A command line that cannot be understood; the message is one sentence that says what to do."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Says an option's value once, not once for each of its names."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        default = self._get_default_metavar_for_optional(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, default)}"


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes `--group-size` for `--group_size`, and raises `UsageError` with a suggestion."""

    def __init__(self, command: str, about: str, positionals: str = "", absent: Iterable[str] = (), **options: Any):
        """`positionals` are named in order; `absent` names options known elsewhere that this version does not have."""
        shown = " ".join(f"[{name.upper()}]" for name in positionals.split())
        super().__init__(
            prog=f"{PROG} {command}",
            usage=f"%(prog)s {shown} [options]",
            description=about,
            allow_abbrev=False,
            formatter_class=_Help,
            **options,
        )
        self.positionals = positionals.split()
        self.absent = frozenset(absent)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Options by name; a positional that is not given is None."""
        found, rest = self.parse_known_args([self._spelling(argument) for argument in arguments])
        # argparse takes optional positionals only before the options in older versions of Python, so they are ours.
        plain = [argument for argument in rest if not argument.startswith("-")]
        unknown = [argument for argument in rest if argument.startswith("-")] + plain[len(self.positionals) :]
        if unknown:
            raise UsageError(self._explain(unknown[0]))
        for index, name in enumerate(self.positionals):
            setattr(found, name, plain[index] if index < len(plain) else None)
        return found

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--?\w+)\S*:", r"\1:", message)  # the first of an option's names is enough
        raise UsageError(f"{message}; `{self.prog} --help` shows the options")

    def _spelling(self, argument: str) -> str:
        """The known spelling of an option that differs only in `-` and `_`."""
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return argument
        plain = {option.replace("-", "_"): option for option in self._option_string_actions}
        return plain.get(name.replace("-", "_"), name) + equals + value

    def _explain(self, argument: str) -> str:
        if not argument.startswith("-"):
            return (
                f"unexpected argument {argument!r}; `{self.prog} --help` shows the options "
                "(values with spaces or braces need quotes)"
            )
        name = argument.partition("=")[0]
        if name in self.absent:
            return f"{name} is not part of this version; `{self.prog} --help` shows the options it has"
        close = difflib.get_close_matches(name, list(self._option_string_actions), n=1, cutoff=0.5)
        first = [self._option_string_actions[option].option_strings[0] for option in close]
        hint = f"; did you mean {first[0]}?" if first else f"; `{self.prog} --help` shows the options"
        return f"unknown argument {name}{hint}"


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show tracebacks and every message of the libraries")


def add_trust(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that the model's folder brings (default: no)"
    )
    group.add_argument("--disable_trust_remote_code", action="store_true", help="the default; accepted for old scripts")


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Benchmark tasks through lm-eval."""
    group = parser.add_argument_group("benchmark tasks (lm-eval, the extra [eval])")
    group.add_argument("--tasks", "--task", nargs="?", const=",".join(DEFAULT_TASKS), help="comma list of tasks")
    group.add_argument("--eval_bs", type=whole_number, metavar="N", help="batch size of the evaluation")
    group.add_argument("--limit", type=float, metavar="X", help="items per task, or a share of them when below 1")
    group.add_argument("--num_fewshot", type=int, metavar="N", help="examples shown before each item")


DEFAULT_TASKS = (
    "lambada_openai",
    "hellaswag",
    "winogrande",
    "piqa",
    "mmlu",
    "wikitext",
    "truthfulqa_mc1",
    "openbookqa",
    "boolq",
    "arc_easy",
    "arc_challenge",
)


def comma_list(text: str | None) -> list[str]:
    return [item.strip() for item in (text or "").split(",") if item.strip()]


def whole_number(text: str) -> int:
    """ "4" or "4.0"; argparse turns the error into its own sentence."""
    value = float(text)
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


# argparse quotes a type by its name: "invalid whole number value: 'x'".
whole_number.__name__ = "whole number"


def number(text: str) -> int | float:
    """ "4" and "4.0" as a whole number, "3.5" as it is."""
    value = float(text)
    return int(value) if value.is_integer() else value


class Names(argparse.Action):
    """Words separated by commas or spaces, as one comma list; given twice, both count."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        known = getattr(namespace, self.dest, None)
        words = [word for value in values for word in comma_list(value)]
        setattr(namespace, self.dest, ",".join(dict.fromkeys([*comma_list(known), *words])))


class Groups(argparse.Action):
    """Groups of words: each value with commas is one, those without are one together; given again, there are more."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        lists = [comma_list(value) for value in values]
        alone = [words[0] for words in lists if len(words) == 1]
        found = [words for words in lists if len(words) > 1] + ([alone] if alone else [])
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest, None) or []), *found])


# ---- lenient JSON -------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|\'((?:[^\'\\]|\\.)*)\'|([{}:,])|([^{}:,"\'\s]+))')
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "none": None}


def layer_config(text: str) -> dict[str, Any]:
    """Rules from a JSON file, JSON, or JSON without its quotes: `{k_proj:{bits:8},lm_head:W8A16}`.

    Raises:
        UsageError: neither; the message quotes the place.
    """
    if not text.lstrip().startswith("{") and Path(text).is_file():
        text = Path(text).read_text(encoding="utf-8")
    try:
        value = json.loads(text)
    except ValueError:
        value = _Lenient(text).parse()
    if not isinstance(value, dict):
        raise UsageError(f"--layer_config {text!r} is not a mapping; write it as '{{k_proj:{{bits:8}},lm_head:W8A16}}'")
    return value


class _Lenient:
    """A reader of JSON objects whose keys and strings may stand without quotes."""

    def __init__(self, text: str):
        self.text = text
        self._tokens = self._scan()
        self._next = next(self._tokens)

    def parse(self) -> Any:
        value = self._value()
        if self._next[0] is not None:
            raise self._problem("something follows the last brace")
        return value

    def _scan(self) -> Iterator[tuple[str | None, Any, int]]:
        """(kind, value, position): kind is the sign itself, "value", or None at the end."""
        position = 0
        while self.text[position:].strip():
            match = _TOKEN.match(self.text, position)
            if match is None:
                raise UsageError(f"--layer_config has an open quote at position {position + 1}: {self._near(position)}")
            position = match.end()
            if match[3]:
                yield match[3], match[3], match.start(3)
            elif match[4]:
                yield "value", match[4], match.start(4)
            else:
                quoted = match[1] if match[1] is not None else match[2]
                yield "string", re.sub(r'\\(["\'\\])', r"\1", quoted), match.start()
        yield None, None, len(self.text)

    def _take(self, kind: str, what: str) -> None:
        if self._next[0] != kind:
            raise self._problem(f"{what} is expected")
        self._next = next(self._tokens)

    def _value(self) -> Any:
        kind, value, _ = self._next
        if kind == "{":
            return self._mapping()
        if kind not in ("value", "string"):
            raise self._problem("a value is expected")
        self._next = next(self._tokens)
        return value if kind == "string" else _scalar(value)

    def _mapping(self) -> dict[str, Any]:
        self._take("{", "an opening brace")
        found: dict[str, Any] = {}
        while self._next[0] != "}":
            kind, key, _ = self._next
            if kind not in ("value", "string"):
                raise self._problem("a name is expected")
            if key in found:
                raise self._problem(f"{key!r} is given twice")
            self._next = next(self._tokens)
            self._take(":", f"a colon after {key!r}")
            found[key] = self._value()
            if self._next[0] != "}":
                self._take(",", "a comma or a closing brace")
        self._next = next(self._tokens)
        return found

    def _problem(self, what: str) -> UsageError:
        position = self._next[2]
        return UsageError(f"--layer_config cannot be read: {what} at position {position + 1}: {self._near(position)}")

    def _near(self, position: int) -> str:
        return repr(self.text[max(0, position - 10) : position + 20])


def _scalar(word: str) -> Any:
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
