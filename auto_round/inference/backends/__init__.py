"""Which code computes a packed layer: a table of backends, and a choice that is a filter over its rows.

Every row states what it can do. A layer gets the row of highest priority that fits; a named backend (the name of a row
or an alias) limits the rows. When none fits, the error gives each row's reason.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from auto_round.formats.float_layouts import AUTO_ROUND_PACKINGS
from auto_round.formats.packing import AUTO_AWQ, AUTO_GPTQ, GPTQMODEL, PLAIN
from auto_round.schemes import QuantizationScheme

if TYPE_CHECKING:
    from torch import nn

PACKAGES = {"auto_round_kernel": "auto-round-lib (pip install 'auto-round[kernels]')"}  # module → where it comes from
_ALL_PACKINGS = (AUTO_GPTQ, PLAIN, GPTQMODEL, AUTO_AWQ)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class PackedLayer:
    """A layer of a checkpoint: `group_size` is what is stored (-1 resolved), `dtype` what it computes in.

    scheme: all that is known of it, for layers that are no plain integers.
    """

    name: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    sym: bool
    packing: str
    dtype: torch.dtype
    has_bias: bool = False
    scheme: QuantizationScheme | None = None

    @property
    def groups(self) -> int:
        return self.in_features // self.group_size

    def __str__(self) -> str:
        kind = "symmetric" if self.sym else "asymmetric"
        return (
            f"{self.name} [{self.out_features}×{self.in_features}], {self.bits} bits {kind}, "
            f"group size {self.group_size}, packing {self.packing}, {str(self.dtype).removeprefix('torch.')}"
        )


@dataclass(frozen=True)
class Backend:
    """One row: what a backend accepts, and "module:attribute" of a builder `(PackedLayer) -> nn.Module`."""

    builder: str
    devices: tuple[str, ...]
    packings: tuple[str, ...]
    bits: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    priority: int
    about: str
    sym: tuple[bool, ...] = (True, False)
    aliases: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    fits: Callable[[PackedLayer], str | None] = lambda layer: None  # a reason why the shape does not fit, or None

    def objection(self, layer: PackedLayer, device: str) -> str | None:
        """Why this backend cannot run the layer on the device; None if it can."""
        missing = [package for package in self.requires if importlib.util.find_spec(package) is None]
        checks: tuple[tuple[bool, str], ...] = (
            (device in self.devices, f"runs on {_names(self.devices)}, not {device}"),
            (layer.packing in self.packings, f"reads packing {_names(self.packings)}"),
            (layer.bits in self.bits, f"has {_names(self.bits)} bits"),
            (layer.sym in self.sym, "is symmetric only" if self.sym == (True,) else "is asymmetric only"),
            (layer.dtype in self.dtypes, f"computes in {_names(self.dtypes)}"),
            (not missing, f"needs the package {_names(PACKAGES.get(name, name) for name in missing)}"),
        )
        return next((reason for fine, reason in checks if not fine), None) or self.fits(layer)


def _names(values: Any) -> str:
    return ", ".join(str(value).removeprefix("torch.") for value in values)


def _multiples_of_32(layer: PackedLayer) -> str | None:
    if layer.packing == AUTO_AWQ and layer.bits != 4:
        return f"reads 4 bits in packing {AUTO_AWQ}, not {layer.bits}"
    if layer.in_features % 32 or layer.out_features % 32:
        return f"needs dimensions that are multiples of 32, not {layer.out_features}×{layer.in_features}"
    if layer.group_size < 1 or layer.in_features % layer.group_size:
        return f"needs a group size that divides the {layer.in_features} inputs"
    return None


def _int4_op_shape(layer: PackedLayer) -> str | None:
    if layer.out_features % 64:
        return f"needs a multiple of 64 outputs, not {layer.out_features}"
    if layer.group_size % 32:
        return f"needs a group size that is a multiple of 32, not {layer.group_size}"
    return _multiples_of_32(layer)


BACKENDS: dict[str, Backend] = {
    "torch": Backend(
        builder="auto_round.inference.backends.torch:QuantLinear",
        aliases=(
            *("auto_round", "auto_round:torch", "torch_zp", "auto_round:torch_zp"),
            *("awq_torch", "gptqmodel:awq_torch", "gptqmodel_awq_torch"),
        ),
        devices=("cpu", "cuda", "xpu", "mps"),  # nothing in it is specific to a device
        packings=_ALL_PACKINGS,
        bits=(2, 3, 4, 5, 6, 7, 8),
        dtypes=_FLOATS,
        fits=_multiples_of_32,
        priority=0,
        about="the reference: dequantizes the weight, then an ordinary matrix product",
    ),
    "torch_int4": Backend(
        builder="auto_round.inference.backends.torch_int4:Int4Linear",
        aliases=("int4", "auto_round:torch_int4"),
        devices=("cpu",),
        packings=_ALL_PACKINGS,
        bits=(4,),
        dtypes=(torch.bfloat16,),
        fits=_int4_op_shape,
        priority=5,
        about="PyTorch's 4-bit product for few rows, the reference for many",
    ),
    "auto_round_kernel": Backend(
        builder="auto_round.inference.backends.ark:ArkLinear",
        aliases=("ark", "auto_round_kernel_zp", "auto_round_kernel_awq"),
        devices=("cpu",),
        packings=_ALL_PACKINGS,
        bits=(2, 3, 4, 5, 6, 7, 8),
        dtypes=_FLOATS,
        fits=_multiples_of_32,
        requires=("auto_round_kernel",),
        priority=3,
        about="the kernels of auto-round-lib for few rows, the reference for many",
    ),
    "torch_float": Backend(
        builder="auto_round.inference.backends.floats:FloatLinear",
        aliases=(
            *("torch", "auto_round", "auto_round:torch"),
            *(f"auto_round:torch_{kind}" for kind in ("mxfp4", "mxfp8", "nvfp4", "mxint4", "fp8_static")),
        ),
        devices=("cpu", "cuda", "xpu", "mps"),
        packings=AUTO_ROUND_PACKINGS,
        bits=(4, 8),
        sym=(True,),
        dtypes=_FLOATS,
        priority=0,
        about="the reference: dequantizes the weight and rounds the input, then an ordinary matrix product",
    ),
}


ELSEWHERE = {
    "gptqmodel": "GPTQModel's kernels for CUDA",
    "marlin": "GPTQModel's kernels for CUDA",
    "exllamav2": "GPTQModel's kernels for CUDA",
    "gptq": "AutoGPTQ's kernels for CUDA",
    "auto_gptq": "AutoGPTQ's kernels for CUDA",
    "awq": "AutoAWQ's kernels for CUDA",
    "auto_awq": "AutoAWQ's kernels for CUDA",
    "triton": "Triton's kernels for CUDA and XPU",
    "humming": "Humming's kernels for CUDA",
    "cute": "CuTe's kernels for CUDA",
    "auto_round_kernel_": "auto-round-lib's kernels for XPU",
    "hpu": "kernels for Gaudi",
    "mlx": "MLX's kernels for Apple silicon",
    "fake": "models that keep floats",
}
"""Beginnings of names that other loaders have, for what is not called from here → what they mean."""


def backend_names(requested: str) -> tuple[str, ...]:
    """The rows that a name means: all for "auto", else the row of that name or those with that alias.

    Raises:
        ValueError: no such backend; the message lists the known ones.
    """
    wanted = (requested or "auto").strip().lower()
    if wanted == "auto":
        return tuple(BACKENDS)
    found = tuple(name for name, row in BACKENDS.items() if wanted == name or wanted in row.aliases)
    if not found:
        raise ValueError(_unknown(requested, wanted))
    return found


def _unknown(requested: str, wanted: str) -> str:
    known = f"known: auto, {', '.join(BACKENDS)}"
    stem = wanted.removeprefix("auto_round:")
    meaning = next((text for start, text in ELSEWHERE.items() if stem.startswith(start)), None)
    if meaning is not None:
        return f"unknown backend {requested!r}; {known}; it means {meaning}, which are not called here: leave it out"
    close = difflib.get_close_matches(wanted, BACKENDS, n=1, cutoff=0.5)
    return f"unknown backend {requested!r}{f'; did you mean {close[0]!r}?' if close else ''}; {known}"


def choose_backend(layer: PackedLayer, device: str, requested: str = "auto") -> tuple[str, str]:
    """(backend name, why) for a layer on a device.

    Raises:
        ValueError: an unknown backend, or none that fits; the message gives each row's reason.
    """
    names = backend_names(requested)
    objections = {name: BACKENDS[name].objection(layer, device) for name in names}
    usable = [name for name in names if objections[name] is None]
    if not usable:
        reasons = "; ".join(f"{name} {reason}" for name, reason in objections.items())
        others = [name for name in BACKENDS if name not in names and BACKENDS[name].objection(layer, device) is None]
        usable_ones = f"; usable: {', '.join(others)}" if others else ""
        wanted = "" if requested == "auto" else f"{requested!r} "
        raise ValueError(f"no backend {wanted}for {layer}: {reasons}{usable_ones}")
    chosen = max(usable, key=lambda name: BACKENDS[name].priority)
    better = [
        f"{name} {reason}"
        for name, reason in objections.items()
        if reason is not None and BACKENDS[name].priority > BACKENDS[chosen].priority
    ]
    why = BACKENDS[chosen].about + (f" ({'; '.join(better)})" if better else "")
    return chosen, why


def build_layer(name: str, layer: PackedLayer) -> nn.Module:
    """An empty module of a backend for a layer; its tensors wait for the checkpoint."""
    module, attribute = BACKENDS[name].builder.split(":")
    return getattr(importlib.import_module(module), attribute)(layer)
