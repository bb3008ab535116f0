"""A scheme for each layer, chosen for a budget: what is asked for.

`sensitivity` measures what each option costs in quality, `budget` counts bits or bytes, `solve` finds the best choice
within the budget, and `choose` puts them together. The choice becomes part of the plan, so that everything that follows
a plan is the same with and without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auto_round.schemes import QuantizationScheme, SchemeError, parse_scheme
from auto_round.settings import SettingsError

NSAMPLES, SEQLEN = 16, 256
"""Text on which sensitivities are measured; more changes the choice little (see benchmarks/README.md)."""


@dataclass(frozen=True)
class AutoScheme:
    """Which schemes to choose from for each layer, and how much they may take together.

    Args:
        avg_bits: bits per weight, on average over the layers that are chosen for, scales and zero points included.
        options: names of schemes, as a list or separated by commas, or schemes; "BF16" leaves a layer as it is.
        target_size: instead of `avg_bits`, the bytes of the weights that are written: 20000000000, "20GB", "18GiB".
        shared_layers: groups of layer names or patterns that get one scheme, block by block, beside those that engines
            run as one, which always do.
        method: "default", the only one.
        ignore_scale_zp_bits: count the codes alone for `avg_bits`.
        nsamples, seqlen: size of the text that sensitivities are measured on; None for 16 samples of 256 tokens.
        dataset: None for the run's own; a name or file as for `AutoRound`.
        batch_size, device_map, enable_torch_compile, low_gpu_mem_usage, low_cpu_mem_usage: accepted for compatibility;
            the run's device and memory count.

    Raises:
        SettingsError, SchemeError: a value that cannot be, or neither or both of `avg_bits` and `target_size`.
    """

    avg_bits: float | None = None
    options: str | Sequence[str | QuantizationScheme] = ()
    shared_layers: Sequence[Sequence[str]] | None = None
    method: str = "default"
    ignore_scale_zp_bits: bool = False
    batch_size: int | None = None
    nsamples: int | None = None
    seqlen: int | None = None
    dataset: str | None = None
    device_map: Any = None
    enable_torch_compile: bool | None = None
    low_gpu_mem_usage: bool = True
    low_cpu_mem_usage: bool = True
    target_size: int | str | None = None

    def __post_init__(self) -> None:
        if (self.avg_bits is None) == (self.target_size is None):
            raise SettingsError(
                "AutoScheme needs a budget: avg_bits (--bits, such as 3.0) or target_size (--target-size, such as "
                "20GB), not both"
            )
        if self.avg_bits is not None and not (isinstance(self.avg_bits, (int, float)) and 0 < self.avg_bits <= 32):
            raise SettingsError(f"avg_bits={self.avg_bits!r} must be a number of bits per weight, such as 3.0")
        if self.target_size is not None:
            _ = self.target_bytes
        if self.method != "default":
            raise SettingsError(f"method={self.method!r} of AutoScheme is not known: use 'default'")
        if self.dataset is not None and not isinstance(self.dataset, str):
            raise SettingsError("dataset of AutoScheme must be a name or a file; leave it out for the run's own")
        for name in ("nsamples", "seqlen"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise SettingsError(f"{name}={value!r} of AutoScheme must be a whole number of at least 1")
        if len(self.schemes) < 2:
            raise SettingsError(f"AutoScheme needs two options or more to choose from, such as W2A16,W4A16: {self}")

    def __str__(self) -> str:
        budget = f"{self.avg_bits:g} bits" if self.avg_bits is not None else str(self.target_size)
        return f"{budget} of {', '.join(self.schemes)}"

    @property
    def schemes(self) -> dict[str, QuantizationScheme]:
        """The options by name, in the order given; those that mean the same once.

        Raises:
            SchemeError: an option is no scheme that a layer can have.
        """
        given = self.options.split(",") if isinstance(self.options, str) else self.options
        found: dict[str, QuantizationScheme] = {}
        for option in given:
            name = option.strip().upper() if isinstance(option, str) else _name(option)
            if "MIXED" in name:
                raise SchemeError(f"the option {name} is a mixture itself: give the schemes it is made of")
            scheme = parse_scheme(option)
            if name and scheme not in found.values():
                found[name] = scheme
        return found

    @property
    def target_bytes(self) -> int:
        """`target_size` as a number.

        Raises:
            SettingsError: it is no size.
        """
        from auto_round.formats.writer import parse_size

        try:
            return parse_size(self.target_size)
        except ValueError as error:
            raise SettingsError(
                f"target_size={self.target_size!r} is not a number of bytes or a size such as '20GB' or '18GiB'"
            ) from error

    @property
    def start(self) -> QuantizationScheme:
        """What stands for all layers until their schemes are chosen: an option within the budget, if one is."""
        quantized = [scheme for scheme in self.schemes.values() if scheme.is_quantized]
        within = [one for one in quantized if self.avg_bits is not None and one.bits <= self.avg_bits]
        return max(within, key=lambda one: one.bits) if within else min(quantized, key=lambda one: one.bits)

    @property
    def label(self) -> str:
        """Stands for the scheme in the name of an output folder."""
        budget = f"{self.avg_bits:g}bits" if self.avg_bits is not None else str(self.target_size).replace(" ", "")
        return f"auto-{budget}".lower()

    def with_fields(self, fields: Mapping[str, Any]) -> AutoScheme:
        """The same with scheme fields (group_size, sym …) laid over every option that quantizes."""
        if not fields:
            return self
        changed = [parse_scheme(one, **fields) if one.is_quantized else one for one in self.schemes.values()]
        return dataclasses.replace(self, options=changed)

    def arguments(self) -> dict[str, Any]:
        """What `AutoRound` would have to be given instead, for the command that repeats a run."""
        named = {"options": "schemes", "avg_bits": "bits"}
        known = ("options", "avg_bits", "target_size", "shared_layers", "ignore_scale_zp_bits")
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        return {named.get(n, n): getattr(self, n) for n in known if getattr(self, n) != usual[n]}


def _name(scheme: QuantizationScheme | Mapping[str, Any]) -> str:
    """A name for a scheme that was not given by one."""
    scheme = parse_scheme(scheme)
    if not scheme.is_quantized:
        return "BF16"
    family = "" if scheme.data_type == "int" else f"_{scheme.data_type.upper()}"
    size = scheme.group_size
    groups = "" if size == 128 else f"G{'x'.join(map(str, size))}" if isinstance(size, tuple) else f"G{size}"
    return f"W{scheme.bits}A{scheme.act_bits or 16}{groups}{family}{'' if scheme.sym else '_ASYM'}"


LEGACY = {"avg_bits": "bits", "target_bits": "bits", "options": "schemes"}
"""Older names of `AutoRound`'s arguments."""


def asked_for(given: Mapping[str, Any], fields: Mapping[str, Any]) -> AutoScheme | None:
    """The AutoScheme that `AutoRound`'s arguments mean; None where they give one scheme for all.

    Args:
        fields: those arguments that are fields of a scheme; with `schemes`, `bits` is the budget.

    Raises:
        SettingsError: arguments that contradict each other, or say too little.
    """
    given = {LEGACY.get(name, name): value for name, value in given.items() if value is not None}
    schemes, scheme = given.get("schemes"), given.get("scheme")
    if isinstance(scheme, AutoScheme):
        if schemes:
            raise SettingsError("scheme=AutoScheme(…) and schemes=… say the same thing twice: give one")
        return scheme.with_fields({name: value for name, value in fields.items() if name != "bits"})
    extra = [name for name in ("target_size", "shared_layers", "ignore_scale_zp_bits") if given.get(name)]
    if not schemes:
        if extra:
            raise SettingsError(f"{extra[0]} goes with schemes to choose from (--schemes W2A16,W4A16,W8A16)")
        bits = given.get("bits")
        if isinstance(bits, float) and not bits.is_integer():
            raise SettingsError(
                f"bits={bits:g} is an average: give the schemes to choose from, too (--schemes W2A16,W4A16)"
            )
        return None
    if scheme != "W4A16":
        raise SettingsError("scheme and schemes contradict each other: give one scheme, or several to choose from")
    auto = AutoScheme(given.get("bits"), schemes, **{name: given[name] for name in extra})
    return auto.with_fields({name: value for name, value in fields.items() if name != "bits"})
