"""Quantization schemes: what numbers a layer's weights and activations are stored in.

A scheme is a frozen, flat value that reads like a mapping (people index it and compare it with the
`quantization_config` of a checkpoint). Strings and dictionaries become schemes in `parse_scheme` and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


class SchemeError(ValueError):
    """A scheme, or an override of one, that cannot be understood or is not supported."""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is stored: `bits` wide codes, one scale per `group_size` inputs.

    `group_size` is -1 for one group per output row, 0 for one group per tensor.
    """

    bits: int
    group_size: int
    sym: bool
    data_type: str = "int"

    @property
    def is_quantized(self) -> bool:
        return self.bits <= 8


@dataclass(frozen=True)
class QuantizationScheme:
    """Weight and activation number formats of a layer; fields left None follow the weight's."""

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    data_type: str = "int"
    act_bits: int | None = None
    act_group_size: int | None = None
    act_sym: bool | None = None
    act_data_type: str | None = None
    act_dynamic: bool | None = None
    super_bits: int | None = None
    super_group_size: int | None = None

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or not (2 <= self.bits <= 8 or self.bits in (16, 32)):
            raise SchemeError(f"bits={self.bits!r} is not supported: use 2 to 8, or 16 to keep full precision")
        if not _is_int(self.group_size) or self.group_size < -1:
            raise SchemeError(
                f"group_size={self.group_size!r} is not supported: use -1 (one group per output row), "
                "0 (one group per tensor) or a positive number of inputs"
            )
        if not isinstance(self.sym, bool):
            raise SchemeError(f"sym={self.sym!r} must be True or False")

    @property
    def weight(self) -> TensorSpec:
        return TensorSpec(self.bits, self.group_size, self.sym, self.data_type)

    @property
    def is_quantized(self) -> bool:
        return self.weight.is_quantized

    def override(self, **changes: Any) -> QuantizationScheme:
        """A new scheme with the given fields replaced; None leaves a field as it is."""
        unknown = sorted(set(changes) - set(FIELD_NAMES))
        if unknown:
            raise SchemeError(f"unknown scheme field {unknown[0]!r}{_nearest(unknown[0], FIELD_NAMES)}")
        return dataclasses.replace(self, **{k: v for k, v in changes.items() if v is not None})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantizationScheme:
        """Build from a mapping, ignoring keys that are not scheme fields (checkpoint configs carry more)."""
        return cls(**{k: v for k, v in fields.items() if k in FIELD_NAMES and v is not None})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    # Reads like a mapping.
    def keys(self) -> Iterator[str]:
        return iter(FIELD_NAMES)

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def __getitem__(self, key: str) -> Any:
        if key not in FIELD_NAMES:
            raise KeyError(key)
        return getattr(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        value = getattr(self, key, None) if key in FIELD_NAMES else None
        return default if value is None else value

    def items(self) -> Iterator[tuple[str, Any]]:
        return iter(self.to_dict().items())


FIELD_NAMES: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(QuantizationScheme))


def _weight_only_presets() -> dict[str, QuantizationScheme]:
    presets = {}
    for bits in range(2, 9):
        presets[f"W{bits}A16"] = QuantizationScheme(bits=bits, group_size=128, act_bits=16)
        for group_size in (64, 32):
            presets[f"W{bits}A16G{group_size}"] = QuantizationScheme(bits=bits, group_size=group_size, act_bits=16)
    return presets


PRESET_SCHEMES: dict[str, QuantizationScheme] = {
    **_weight_only_presets(),
    "BF16": QuantizationScheme(bits=16, group_size=128, data_type="fp", act_bits=16),
}


def parse_scheme(
    scheme: str | Mapping[str, Any] | QuantizationScheme, base: QuantizationScheme | None = None, **overrides: Any
) -> QuantizationScheme:
    """Turn a preset name (any case), a mapping of fields or a scheme into a `QuantizationScheme`.

    A mapping is laid over its own "scheme" entry if it has one, else over `base`, else over the field defaults.

    Raises:
        SchemeError: an unknown preset or field, or a value out of range.
    """
    if isinstance(scheme, QuantizationScheme):
        parsed = scheme
    elif isinstance(scheme, str):
        parsed = _preset(scheme)
    elif isinstance(scheme, Mapping):
        fields = dict(scheme)
        start = parse_scheme(fields.pop("scheme"), base) if "scheme" in fields else (base or QuantizationScheme())
        parsed = start.override(**fields)
    else:
        raise SchemeError(f"a scheme is a preset name, a mapping or a QuantizationScheme, not {type(scheme).__name__}")
    parsed = parsed.override(**overrides)
    if parsed.is_quantized and parsed.data_type != "int":
        raise SchemeError(f"data_type={parsed.data_type!r} is not supported yet: this version quantizes to 'int'")
    if (parsed.act_bits or 16) < 16:
        raise SchemeError(f"act_bits={parsed.act_bits} is not supported yet: activations stay in 16 bits")
    return parsed


def _preset(name: str) -> QuantizationScheme:
    key = name.strip().upper()
    if key not in PRESET_SCHEMES:
        raise SchemeError(f"unknown scheme {name!r}{_nearest(key, PRESET_SCHEMES)}; `auto-round list` shows them all")
    return PRESET_SCHEMES[key]


def _nearest(name: str, known: Any) -> str:
    """`; did you mean 'x'?` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
