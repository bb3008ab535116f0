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


GroupSize = int | tuple[int, int]

WIDTHS: dict[str, tuple[int, ...]] = {
    "int": (2, 3, 4, 5, 6, 7, 8),
    "mx_int": (4,),
    "mx_fp": (4, 8),
    "mx_fp_rceil": (4, 8),
    "nv_fp": (4,),
    "nv_fp4_with_static_gs": (4,),
    "fp": (8,),
    "int_asym_float_zp": (4, 5),
    "int_sym_dq": (3, 6),
    "int_asym_dq": (2, 4, 5),
}
"""Number families and the widths of their codes. The last three are llama.cpp's; `*_rceil` and `*_static_gs` are how
activations are quantized beside weights of the family of the same beginning."""


GROUPS = {"mx_int": 32, "mx_fp": 32, "nv_fp": 16, "int_asym_float_zp": 32}
"""Families whose groups have one size (Open Compute MX 1.0: 32; NVFP4: 16)."""


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is stored: `bits` wide codes, one scale per `group_size` inputs.

    `group_size` is -1 for one group per output row, 0 for one group per tensor, a pair for a block of that many
    outputs and inputs. `dynamic`: an activation's scale is found anew for each input. llama.cpp's families keep scales
    as codes of `super_bits`, `super_group_size` of them to a super-block.
    """

    bits: int
    group_size: GroupSize
    sym: bool
    data_type: str = "int"
    dynamic: bool = True
    super_bits: int | None = None
    super_group_size: int | None = None

    @property
    def is_quantized(self) -> bool:
        return self.bits <= 8


@dataclass(frozen=True)
class QuantizationScheme:
    """Weight and activation number formats of a layer; fields left None follow the weight's."""

    bits: int = 4
    group_size: GroupSize = 128
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
        for name in ("data_type", "act_data_type"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise SchemeError(f"{name}={getattr(self, name)!r} must be a name such as int or mx_fp")
        object.__setattr__(self, "group_size", _group_size(self.group_size, self.data_type))
        if not isinstance(self.sym, bool):
            raise SchemeError(f"sym={self.sym!r} must be True or False")
        if self.act_bits is not None and (
            not _is_int(self.act_bits) or not (4 <= self.act_bits <= 8 or self.act_bits in (16, 32))
        ):
            raise SchemeError(f"act_bits={self.act_bits!r} is not supported: use 4 or 8, or 16 to keep activations")

    @property
    def weight(self) -> TensorSpec:
        return TensorSpec(
            self.bits,
            self.group_size,
            self.sym,
            self.data_type,
            super_bits=self.super_bits,
            super_group_size=self.super_group_size,
        )

    @property
    def act(self) -> TensorSpec | None:
        """How a layer's input is quantized; None where it is not."""
        if (self.act_bits or 16) > 8 or not self.is_quantized:
            return None
        group_size = self.group_size if self.act_group_size is None else self.act_group_size
        sym = self.sym if self.act_sym is None else self.act_sym
        return TensorSpec(
            self.act_bits, group_size, sym, self.act_data_type or self.data_type, dynamic=self.act_dynamic is not False
        )

    @property
    def needs_input_range(self) -> bool:
        """Whether calibration must find the largest magnitude of a layer's input."""
        act = self.act
        return act is not None and (not act.dynamic or act.data_type.endswith("_static_gs"))

    @property
    def is_quantized(self) -> bool:
        return self.bits <= 8

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


def _group_size(value: Any, data_type: str) -> GroupSize:
    """A group size as it is kept: a whole number, or a pair of them for blocks of float8."""
    if isinstance(value, (list, tuple)):
        if data_type == "fp" and len(value) == 2 and all(_is_int(part) and part > 0 for part in value):
            return tuple(value)
        raise SchemeError(
            f"group_size={value!r}: blocks of outputs × inputs, such as (128, 128), go with data_type 'fp'"
        )
    if not _is_int(value) or value < -1:
        raise SchemeError(
            f"group_size={value!r} is not supported: use -1 (one group per output row), "
            "0 (one group per tensor) or a positive number of inputs"
        )
    return value


def _weight_only_presets() -> dict[str, QuantizationScheme]:
    presets = {}
    for bits in range(2, 9):
        presets[f"W{bits}A16"] = QuantizationScheme(bits=bits, group_size=128, act_bits=16)
        for group_size in (64, 32):
            presets[f"W{bits}A16G{group_size}"] = QuantizationScheme(bits=bits, group_size=group_size, act_bits=16)
    return presets


def _same_for_both(bits: int, group_size: GroupSize, data_type: str, **act: Any) -> QuantizationScheme:
    """Weights and activations of one family; `act` says what differs."""
    both = {"act_bits": bits, "act_group_size": group_size, "act_sym": True, "act_data_type": data_type}
    return QuantizationScheme(
        bits=bits, group_size=group_size, data_type=data_type, **{**both, "act_dynamic": True, **act}
    )


def _gguf(bits: int, group_size: int, data_type: str, super_bits: int | None = None) -> QuantizationScheme:
    sym = data_type in ("int", "int_sym_dq")
    groups = None if super_bits is None else 256 // group_size
    return QuantizationScheme(bits, group_size, sym, data_type, 16, super_bits=super_bits, super_group_size=groups)


GGUF_TYPES: dict[str, QuantizationScheme] = {
    "Q4_0": _gguf(4, 32, "int"),
    "Q4_1": _gguf(4, 32, "int_asym_float_zp"),
    "Q5_0": _gguf(5, 32, "int"),
    "Q5_1": _gguf(5, 32, "int_asym_float_zp"),
    "Q8_0": _gguf(8, 32, "int"),
    "Q2_K": _gguf(2, 16, "int_asym_dq", 4),
    "Q3_K": _gguf(3, 16, "int_sym_dq", 6),
    "Q4_K": _gguf(4, 32, "int_asym_dq", 6),
    "Q5_K": _gguf(5, 32, "int_asym_dq", 6),
    "Q6_K": _gguf(6, 16, "int_sym_dq", 8),
}
"""The number format of each of llama.cpp's tensor types."""

GGUF_FAMILIES = ("int_asym_float_zp", "int_sym_dq", "int_asym_dq")
"""Families that only llama.cpp's files hold."""

GGUF_FILES: dict[str, str] = {
    **{name: name for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K")},
    **{f"Q{bits}_K_{size}": f"Q{bits}_K" for bits in (4, 5) for size in "SM"},
    **{f"Q3_K_{size}": "Q3_K" for size in "SML"},
    "Q2_K": "Q2_K",
    "Q2_K_S": "Q2_K",
}
"""File type → the tensor type that most of its layers have."""


PRESET_SCHEMES: dict[str, QuantizationScheme] = {
    **_weight_only_presets(),
    "MXFP4": _same_for_both(4, 32, "mx_fp"),
    "MXFP8": _same_for_both(8, 32, "mx_fp"),
    "MXFP4_RCEIL": _same_for_both(4, 32, "mx_fp", act_data_type="mx_fp_rceil"),
    "MXFP8_RCEIL": _same_for_both(8, 32, "mx_fp", act_data_type="mx_fp_rceil"),
    "MXINT4": _same_for_both(4, 32, "mx_int"),
    "NVFP4": _same_for_both(4, 16, "nv_fp", act_data_type="nv_fp4_with_static_gs"),
    "FPW8A16": QuantizationScheme(8, 0, True, "fp", 16),
    "FP8_STATIC": _same_for_both(8, -1, "fp", act_group_size=0, act_dynamic=False),
    "FP8_BLOCK": _same_for_both(8, (128, 128), "fp", act_group_size=128),
    "INT8": _same_for_both(8, -1, "int"),
    "INT8_W8A8": _same_for_both(8, -1, "int"),
    **{f"GGUF:{name}": GGUF_TYPES[kind] for name, kind in GGUF_FILES.items()},
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
        parsed = _gguf_type(start, fields) or start.override(**fields)
    else:
        raise SchemeError(f"a scheme is a preset name, a mapping or a QuantizationScheme, not {type(scheme).__name__}")
    return _checked(parsed.override(**overrides))


def _gguf_type(base: QuantizationScheme, fields: Mapping[str, Any]) -> QuantizationScheme | None:
    """llama.cpp's type of another width, where only the width is asked for of one of its types."""
    if base.super_bits is None or set(fields) != {"bits"}:
        return None
    return GGUF_TYPES.get(f"Q{fields['bits']}_K") or GGUF_TYPES.get(f"Q{fields['bits']}_0")


def _checked(scheme: QuantizationScheme) -> QuantizationScheme:
    """A scheme whose families exist in the widths it asks for; `fp8` and `mx_fp4` say their width in their name.

    Raises:
        SchemeError: an unknown family, or one without that width.
    """
    if not scheme.is_quantized:
        return scheme
    scheme = _family(scheme, "data_type", "bits")
    if scheme.act is not None and scheme.act_data_type is not None:
        scheme = _family(scheme, "act_data_type", "act_bits")
    if scheme.group_size != GROUPS.get(scheme.data_type, scheme.group_size):
        raise SchemeError(
            f"group_size={scheme.group_size} does not go with data_type {scheme.data_type!r}, whose groups are of "
            f"{GROUPS[scheme.data_type]}: start from a preset such as MXFP4 or NVFP4"
        )
    if scheme.act is not None and scheme.data_type == "int" and scheme.bits < 8:
        raise SchemeError(
            f"bits={scheme.bits} with act_bits={scheme.act_bits} is not supported: no engine runs integer weights of "
            "fewer than 8 bits on integer activations; use INT8, MXFP4 or NVFP4, or leave activations in 16 bits"
        )
    return scheme


def _family(scheme: QuantizationScheme, field: str, width: str) -> QuantizationScheme:
    name, bits = getattr(scheme, field), getattr(scheme, width)
    if name not in WIDTHS:
        stem = name.rstrip("0123456789")
        if stem == name or stem not in WIDTHS:
            raise SchemeError(f"unknown {field} {name!r}{_nearest(name, WIDTHS)}; known: {', '.join(WIDTHS)}")
        name, bits = stem, int(name[len(stem) :])
        scheme = dataclasses.replace(scheme, **{field: name, width: bits})
    if bits not in WIDTHS[name]:
        raise SchemeError(
            f"{width}={bits} is not a width of {field} {name!r}: it has {', '.join(map(str, WIDTHS[name]))}"
        )
    return scheme


def _preset(name: str) -> QuantizationScheme:
    key = name.strip().upper()
    kind = key.removeprefix("GGUF:")
    if key.startswith("GGUF:") and kind in GGUF_TYPES:
        return GGUF_TYPES[kind]
    if key not in PRESET_SCHEMES:
        raise SchemeError(f"unknown scheme {name!r}{_nearest(key, PRESET_SCHEMES)}; `auto-round list` shows them all")
    return PRESET_SCHEMES[key]


def _nearest(name: str, known: Any) -> str:
    """`; did you mean 'x'?` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
