"""Refuses checkpoints that are broken or not understood, before and after Transformers reads them.

Transformers fills what a file lacks with random numbers, and reports a damaged file without its name. The checks here
look at the configuration and at the headers of the files first, so that an error names the tensor and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.formats.float_layouts import AUTO_ROUND_PACKINGS
from auto_round.formats.packing import AUTO_AWQ, AUTO_GPTQ, GPTQMODEL, PACKINGS, normalize_packing, packed_shapes
from auto_round.inference.backends.packed import PackedLinear
from auto_round.inference.backends.torch import QuantLinear
from auto_round.modeling.checkpoint import Checkpoint, CheckpointError, TensorEntry, read_header, read_index
from auto_round.modeling.reading import AGAIN as _AGAIN
from auto_round.modeling.reading import kind_of as _kind
from auto_round.modeling.reading import read_json
from auto_round.utils.patterns import Patterns, is_expression

METHODS = ("auto-round", "gptq", "awq")
_GPTQ_FORMATS = {"gptq": AUTO_GPTQ, "gptq_v2": GPTQMODEL}
_CODES = {torch.int32}
_DTYPES = {
    "qweight": _CODES,
    "qzeros": _CODES,
    "scales": {torch.float16, torch.bfloat16, torch.float32},
    "g_idx": {torch.int32, torch.int64},
}


@dataclass(frozen=True)
class PackedIntegers:
    """What a configuration says of a layer of packed integers; `shape` is [out, in], None where no model tells it."""

    bits: int
    group_size: int
    packing: str
    shape: tuple[int, int] | None = None


# ---- the configuration ------------------------------------------------------------------------------------------


def check_config(settings: Mapping[str, Any]) -> None:
    """Refuse a `quantization_config` that is not understood.

    Raises:
        ValueError: an unknown method or layout, or an entry of another type than it has to be; names the key.
    """
    method = str(settings.get("quant_method", METHODS[0]))
    if method not in METHODS:
        raise ValueError(f"quantization_config has quant_method {method!r}, which AutoRound does not load: {METHODS}")
    version = str(settings.get("version") or "gemm").lower()
    if method == "awq" and version != "gemm":
        raise ValueError(f"quantization_config has AWQ's layout {version!r}: only 'gemm' can be loaded")
    for key in ("extra_config", "dynamic"):
        entries = settings.get(key) or {}
        if not isinstance(entries, Mapping):
            raise ValueError(f"quantization_config.{key} must map layers to settings, not be {_kind(entries)}")
        for layer, fields in entries.items():
            if not isinstance(fields or {}, Mapping):
                raise ValueError(f"quantization_config.{key}[{layer!r}] must be settings such as {{'bits': 8}}")
    for key in ("modules_to_not_convert", "modules_in_block_to_quantize", "block_name_to_quantize", "quant_block_list"):
        if not _are_names(settings.get(key) or []):
            raise ValueError(f"quantization_config.{key} must be a list of names, not {_kind(settings[key])}")


def packing_of(settings: Mapping[str, Any]) -> str:
    """The packing of a checkpoint by its `quantization_config`.

    Raises:
        ValueError: it is none that can be loaded; names those that can.
    """
    method = settings.get("quant_method")
    default = {"gptq": AUTO_GPTQ, "awq": AUTO_AWQ}.get(method, AUTO_GPTQ)
    named = settings.get("packing_format") or default
    if named in AUTO_ROUND_PACKINGS:
        return named
    packing = normalize_packing(named)
    form = settings.get("checkpoint_format")  # GPTQModel's: whether zero points are stored one too low
    if form is None or packing != AUTO_GPTQ:
        return packing
    if form not in _GPTQ_FORMATS:
        known = " and ".join(_GPTQ_FORMATS)
        raise ValueError(f"quantization_config has checkpoint_format {form!r}: only {known} can be loaded")
    return _GPTQ_FORMATS[form]


def packed_as(quantization: Mapping[str, Any], layer: str) -> PackedIntegers:
    """What a configuration says of a packed layer, without a model: by its stored name.

    Raises:
        CheckpointError: the configuration keeps the layer in floats.
    """
    patterns, fields = Patterns("quantization_config"), dict(quantization)
    kept = any(part in layer for part in quantization.get("modules_to_not_convert") or ())
    for rule, values in (quantization.get("dynamic") or {}).items():
        if patterns.match(rule.removeprefix("+:").removeprefix("-:"), layer):
            kept = kept or rule.startswith("-:")
            fields |= values or {}
            break
    extra = quantization.get("extra_config") or {}
    named = [key for key in extra if is_expression(key) and patterns.search(key, layer)]
    for key in (*named, *([layer] if layer in extra else [])):
        fields |= extra[key] or {}
    if kept or int(fields.get("bits", 4)) > 8:
        raise CheckpointError(f"{layer} is packed, but config.json says that it is not quantized")
    return PackedIntegers(int(fields.get("bits", 4)), int(fields.get("group_size", 128)), packing_of(quantization))


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(map(_are_names, value)))


# ---- files, before they are read --------------------------------------------------------------------------------


def stored_entries(folder: Path) -> Mapping[str, TensorEntry]:
    """Headers of the files that Transformers will read from a model folder; empty if they have other names.

    Raises:
        CheckpointError: a file that is missing, truncated, outside the folder, or no safetensors; or an index that
            names tensors which its shards do not hold.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        return {}
    entries = Checkpoint(folder).entries
    for name, file in read_index(folder).items():
        if name not in entries or entries[name].file.name != file:
            raise CheckpointError(f"{index} says that {file} holds {name!r}, and it does not: {_AGAIN}")
    return entries


def check_stored(
    entries: Mapping[str, TensorEntry],
    resolve: Callable[[str], str | None],
    layers: Mapping[str, PackedIntegers],
    others: Container[str] = (),
) -> None:
    """Compare what files hold with what a model was told to expect.

    resolve: a layer's stored name → its module path, None if the model has no such layer. layers: module path → what is
    expected. others: layers that are packed in another way, or shared.

    Raises:
        CheckpointError: a packed layer that is not expected, or that has other tensors; names the file.
    """
    for name, entry in entries.items():
        stem = name.removesuffix(".qweight")
        module = resolve(stem) if stem != name else None
        if module is None or module in others:
            continue
        if module not in layers:
            raise CheckpointError(
                f"{entry.file}: {stem} is packed, but quantization_config keeps it in floats: correct its "
                "modules_to_not_convert, extra_config, dynamic, lm_head or block names"
            )
        problem = packed_problem(entries, stem, layers[module])
        if problem is not None:
            raise CheckpointError(f"{entry.file}: {problem}")


def packed_problem(entries: Mapping[str, TensorEntry], stem: str, layer: PackedIntegers) -> str | None:
    """What is wrong with the stored tensors of a packed layer: one missing, its dtype or its shape; None if nothing.

    Without `layer.shape`, tensors are compared with each other only.
    """
    parts = {suffix: entries[f"{stem}.{suffix}"] for suffix in _DTYPES if f"{stem}.{suffix}" in entries}
    missing = [suffix for suffix in ("qweight", "qzeros", "scales") if suffix not in parts]
    if missing:
        return f"{stem} has no {missing[0]}: {_AGAIN}"
    for suffix, entry in parts.items():
        if entry.dtype not in _DTYPES[suffix]:
            return f"{stem}.{suffix} holds {_name(entry.dtype)}, not {_names(_DTYPES[suffix])}: {_AGAIN}"
    found = {suffix: entry.shape for suffix, entry in parts.items()}
    if any(len(shape) != (1 if suffix == "g_idx" else 2) for suffix, shape in found.items()):
        return f"the tensors of {stem} have shapes {found}, which no packed layer has: {_AGAIN}"
    out, inputs = layer.shape or _own_shape(found, layer)
    size = inputs if layer.group_size in (-1, 0) else layer.group_size
    if size < 1 or inputs % size:
        return (
            f"the group size {size} of {stem} does not divide its {inputs} inputs: quantization_config is not its own"
        )
    expected = packed_shapes(layer.packing, out, inputs, inputs // size, layer.bits) | {"g_idx": (inputs,)}
    for suffix, shape in found.items():
        if shape != expected[suffix]:
            return (
                f"{stem}.{suffix} has shape {list(shape)}, not {list(expected[suffix])} as {layer.bits} bits in groups "
                f"of {size} have for {out}×{inputs} weights{_guess(found, layer, inputs)}: "
                f"correct quantization_config, or {_AGAIN}"
            )
    return None


def _own_shape(found: Mapping[str, tuple[int, ...]], layer: PackedIntegers) -> tuple[int, int]:
    """[out, in] by what does not depend on the width of codes, as far as that is stored."""
    groups, out = found["scales"]
    if "g_idx" in found:
        return out, found["g_idx"][0]
    if layer.group_size > 0:
        return out, groups * layer.group_size
    rows = found["qweight"][0]
    return out, rows if PACKINGS[layer.packing][0] == "awq" else rows * 32 // layer.bits


def _guess(found: Mapping[str, tuple[int, ...]], layer: PackedIntegers, inputs: int) -> str:
    """` (the file looks like …)` where other settings would explain the shapes."""
    guesses = []
    width = found["qweight"][0] * 32 / max(inputs, 1)
    if PACKINGS[layer.packing][0] == "gptq" and width != layer.bits and width in range(2, 9):
        guesses.append(f"{width:.0f} bits")
    groups = found["scales"][0]
    if layer.shape is not None and groups and inputs % groups == 0 and inputs // groups != layer.group_size:
        guesses.append(f"groups of {inputs // groups}")
    return f" (the file looks like {' in '.join(guesses)})" if guesses else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(sorted(map(_name, dtypes)))


def check_float_shapes(
    entries: Mapping[str, TensorEntry], model: nn.Module, renamed: Callable[[str], bool], layers: Container[str]
) -> None:
    """Compare the shapes of tensors that are stored as a model has them; `layers` will be replaced, and are left out.

    renamed: whether Transformers changes a tensor of this name while it loads it.

    Raises:
        CheckpointError: a tensor of another shape, which the model cannot do without (see `is_required`).
    """
    for name, tensor in model.state_dict().items():
        entry = entries.get(name)
        if entry is None or name.rpartition(".")[0] in layers or renamed(name) or not is_required(model, name):
            continue
        if entry.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{entry.file}: {name} has shape {list(entry.shape)}, the model of config.json {list(tensor.shape)}: "
                f"{_AGAIN}, or correct config.json"
            )


# ---- configurations of other tools ------------------------------------------------------------------------------


def loadable_config(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a folder in the form that Transformers' AutoRoundConfig takes; None if it has none.

    AutoGPTQ and AutoAWQ kept theirs in a file of its own (`quantize_config.json`, `quant_config.json`), AutoAWQ under
    other keys; GPTQModel adds a `meta` of its version, at which Transformers stops.
    """
    config = read_json(folder / "config.json")
    text = config.get("text_config") or {}
    found = dict(config.get("quantization_config") or text.get("quantization_config") or {})
    for file, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if not found and (folder / file).is_file():
            found = {"quant_method": method, **read_json(folder / file)}
    for key, old in (("bits", "w_bit"), ("group_size", "q_group_size")):
        if old in found:
            found.setdefault(key, found.pop(old))
    if found.get("quant_method") == "gptq":
        found.pop("meta", None)
    if isinstance(found.get("version"), str):
        found["version"] = found["version"].lower()
    return found or None


# ---- the model, after its weights were read ---------------------------------------------------------------------


def check_loaded(model: nn.Module) -> None:
    """Refuse a model of which the checkpoint lacked a tensor: Transformers has filled it with random numbers.

    Tensors beside the base model may be new where another class was saved (a classifier's head). A model spread over
    devices is not checked, as moving tensors loses Transformers' mark of what was read.

    Raises:
        ValueError: names the first missing tensors.
    """
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return
    lost = [name for name, tensor in _own_tensors(model) if not getattr(tensor, "_is_hf_initialized", False)]
    lost = [name for name in lost if is_required(model, name)]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise ValueError(
            f"the checkpoint {getattr(model.config, '_name_or_path', '')} has no {', '.join(lost[:3])}{more}, which "
            f"Transformers has filled with random numbers: {_AGAIN}, or correct its quantization_config"
        )


def _own_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and stored buffers by name, but those of packed layers, which check themselves."""
    for prefix, module in model.named_modules():
        if isinstance(module, (QuantLinear, PackedLinear)):
            continue
        temporary = module._non_persistent_buffers_set
        buffers = {name: value for name, value in module._buffers.items() if name not in temporary}
        for name, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is not None and not tensor.is_meta:
                yield f"{prefix}.{name}".removeprefix("."), tensor


def is_required(model: nn.Module, name: str) -> bool:
    """Whether a model is of no use without a tensor of its checkpoint."""
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    if any(re.search(pattern, name) for pattern in optional):  # patterns of the model's class, not of its files
        return False
    saved_as = getattr(model.config, "architectures", None) or [type(model).__name__]
    base = getattr(model, "base_model_prefix", "")
    is_head = hasattr(model, base) and not name.startswith(f"{base}.")
    return not (is_head and type(model).__name__ not in saved_as)
