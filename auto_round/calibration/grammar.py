"""How people name calibration data: `name:0.5:split=a+b:apply_chat_template:system_prompt="...",name:num=8`.

A name is a file, a data set of the hub, `builtin` or `self`; options follow it, a bare number being its weight.
"""

import dataclasses
import difflib
import math
import re
from pathlib import Path
from typing import Any

from auto_round.calibration.hub import (
    BUILTIN,
    FILE_TYPES,
    SELF,
    WAY_OUT,
    CalibrationDataError,
    CalibrationFileNotFoundError,
    Source,
    builtin_source,
    find_hub_dataset,
    short,
)

OPTIONS = ("split", "num", "weight", "concat", "apply_chat_template", "system_prompt")


def parse_sources(text: str) -> list[Source]:
    """Read `name[:weight][:option[=value]]*[,name...]`.

    Raises CalibrationDataError for an unknown or malformed option and CalibrationFileNotFoundError for a missing file.
    """
    if Path(text).is_file():  # a path that happens to hold a colon or a comma
        return [_make_source(text, {})]
    parts = [part.strip() for part in _split_outside_quotes(text, ",")]
    if not all(parts):
        raise CalibrationDataError(f"The data set string {text!r} has an empty name; write name[:option=value][,name].")
    return [_parse_source(part) for part in parts]


def _split_outside_quotes(text: str, separator: str) -> list[str]:
    parts, quoted = [""], False
    for char in text:
        quoted ^= char == '"'
        if char == separator and not quoted:
            parts.append("")
        else:
            parts[-1] += char
    if quoted:
        raise CalibrationDataError(f'The data set string {text!r} opens a double quote (") and never closes it.')
    return parts


def _parse_source(part: str) -> Source:
    name, *options = _split_outside_quotes(part, ":")
    values: dict[str, str] = {}
    for option in options:
        key, _, value = option.partition("=")
        key = key.strip()
        if re.fullmatch(r"\d*\.?\d+", option.strip()):  # a bare number is the weight
            key, value = "weight", option
        if key not in OPTIONS:
            near = difflib.get_close_matches(key, OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(OPTIONS)}."
            raise CalibrationDataError(f"Unknown option {key!r} for the data set {name!r}; {hint}")
        values[key] = value.strip().replace('"', "")
    return _make_source(name.strip(), values)


def _make_source(name: str, values: dict[str, str]) -> Source:
    own = {BUILTIN: builtin_source, SELF: lambda: Source(SELF, "the model's own text", is_file=False)}
    return dataclasses.replace(own[name]() if name in own else _found_source(name), **_options(name, values))


def _options(name: str, values: dict[str, str]) -> dict[str, Any]:
    if "num" in values and "weight" in values:
        raise CalibrationDataError(f"The data set {name!r} has num= and a weight: give one, both say how much of it.")
    if name == SELF and "split" in values:
        raise CalibrationDataError("Option split= does not apply to the text that the model writes; remove it.")
    return {
        "splits": tuple(s.strip() for s in values["split"].split("+") if s.strip()) if "split" in values else (),
        "num": _parse_count(name, values.get("num")),
        "weight": _parse_weight(name, values.get("weight")),
        "concat": _parse_switch(name, "concat", values),
        "apply_chat_template": _parse_switch(name, "apply_chat_template", values),
        "system_prompt": values.get("system_prompt"),
    }


def _found_source(name: str) -> Source:
    path = Path(name)
    is_file = path.is_file() or path.suffix.lower() in FILE_TYPES
    if is_file:
        _check_file(path)
    elif not path.is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise CalibrationDataError(
            f"{short(name)!r} is neither a file nor the name of a hub data set; pass text as a list of strings."
        )
    label = name if is_file or path.is_dir() else f"hub {find_hub_dataset(name).repo}"
    return Source(name, label, is_file)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise CalibrationFileNotFoundError(f"The calibration file {path} does not exist; check the path or {WAY_OUT}.")
    if path.suffix.lower() not in FILE_TYPES:
        raise CalibrationDataError(
            f"The calibration file {path} has the type {path.suffix or 'none'!r}; give a .json, .jsonl or .txt file."
        )


def _parse_count(name: str, value: str | None) -> int | None:
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise CalibrationDataError(f"Option num={value!r} of the data set {name!r} must be a whole number above 0.")
    return int(value)


def _parse_weight(name: str, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        weight = float(value)
    except ValueError:
        weight = 0.0
    if not 0 < weight < math.inf:
        raise CalibrationDataError(
            f"The weight {value!r} of the data set {name!r} must be a number above 0, as in 0.5."
        )
    return weight


def _parse_switch(name: str, key: str, values: dict[str, str]) -> bool | None:
    if key not in values:
        return None
    value = values[key].lower()
    if value not in ("", "true", "1", "false", "0"):
        raise CalibrationDataError(f"Option {key}={values[key]!r} of the data set {name!r} must be true or false.")
    return value in ("", "true", "1")
