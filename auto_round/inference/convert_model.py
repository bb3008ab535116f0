"""Turns an empty Transformers model into one with packed layers, as its checkpoint's `quantization_config` describes.

Transformers calls `infer_target_device` and `convert_hf_model` before it reads the weights (the model is on the meta
device) and `post_init` after. Everything happens in place on that one model; nothing global is touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, WeightTransform

from auto_round.formats.float_layouts import float_packing
from auto_round.formats.packing import PACKINGS, normalize_packing
from auto_round.inference.backends import PackedLayer, build_layer, choose_backend
from auto_round.inference.backends.own_forward import has_own_forward, keep_forward
from auto_round.inference.backends.packed import PackedLinear
from auto_round.inference.backends.shared import SharedLinear
from auto_round.inference.backends.torch import QuantLinear
from auto_round.inference.checks import (
    PackedIntegers,
    check_config,
    check_float_shapes,
    check_loaded,
    check_stored,
    packing_of,
    stored_entries,
)
from auto_round.logger import logger
from auto_round.modeling.fused_moe.replace_modules import apply_replacements
from auto_round.modeling.reading import reading
from auto_round.schemes import FIELD_NAMES, QuantizationScheme, SchemeError
from auto_round.utils.common import is_supported_layer, is_transposed
from auto_round.utils.model import get_block_names, get_lm_head_name, tied_layers
from auto_round.utils.patterns import Patterns, is_expression

_KEPT = QuantizationScheme(bits=16, data_type="float")


def get_available_devices() -> list[str]:
    """Device types of this machine, best first."""
    found = [name for name in ("cuda", "hpu", "xpu", "mps") if _is_available(name)]
    return [*found, "cpu"]


def _is_available(name: str) -> bool:
    modules = (getattr(torch, name, None), getattr(torch.backends, name, None))
    return any(module.is_available() for module in modules if hasattr(module, "is_available"))


def infer_target_device(device_map: Mapping[str, Any] | str | int | torch.device | None = None) -> str:
    """The device type that most layers of a model will run on."""
    if device_map is None:
        return "cpu"
    places = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    for place in places:
        text = str(place)
        if isinstance(place, int) or text in ("auto", "balanced", "balanced_low_0", "sequential"):
            return get_available_devices()[0]
        if text not in ("cpu", "disk"):
            return text.split(":")[0]
    return "cpu"


def convert_hf_model(model: nn.Module, target_device: str = "cpu") -> tuple[nn.Module, list[str]]:
    """Replace the quantized layers of an empty model, in place; returns it and the backends in use.

    Raises:
        CheckpointError: a scheme, packing or backend that cannot be served, by layer and with the reasons; or files
            that are damaged, or are not what the configuration says, by tensor.
    """
    folder = getattr(model.config, "_name_or_path", "") or type(model).__name__
    with reading(f"{folder}: quantization_config of config.json"):
        return _convert(model, target_device)


def _convert(model: nn.Module, target_device: str) -> tuple[nn.Module, list[str]]:
    settings = _settings(model.config.quantization_config)
    check_config(settings)
    packing = packing_of(settings)
    _mark_initialized(model, apply_replacements(model))
    requested = settings.get("backend") or "auto"
    schemes = {name: s for name, s in get_layer_config(model, settings).items() if s.is_quantized}
    used: Counter[tuple[str, str]] = Counter()
    aliases = tied_layers(model)
    _check_files(model, schemes, packing, aliases)
    for name, scheme in schemes.items():
        if name not in aliases:
            used[_replace(model, name, scheme, packing, target_device, requested)] += 1
    _share_tied(model, {name: home for name, home in aliases.items() if home in schemes})
    if not schemes:
        logger.warning("quantization_config matches no layer of %s", type(model).__name__)
    for (backend, reason), count in used.items():
        logger.info("backend %s for %d layers on %s: %s", backend, count, target_device, reason)
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    model._keys_to_ignore_on_load_missing = {*ignored, r"\.g_idx$"}  # optional, see QuantLinear
    unused = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    model._keys_to_ignore_on_load_unexpected = {*unused, r"\.[qkv]_scale$"}  # for engines with a cache of float8
    return model, list(dict.fromkeys(backend for backend, _ in used))


def _mark_initialized(model: nn.Module, replaced: Iterable[str]) -> None:
    """Keep Transformers' weight initialization off modules that expect what was replaced in them.

    Everything they hold comes from the checkpoint; initializing would look for fused parameters that are gone.
    """
    for name in replaced:
        while name:
            model.get_submodule(name)._is_hf_initialized = True
            name = name.rpartition(".")[0]


def _share_tied(model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Let layers that are tied to packed ones be those; what they hold is stored under one name."""
    for name, home in aliases.items():
        model.set_submodule(name, SharedLinear(model.get_submodule(home)))
        model.all_tied_weights_keys.pop(f"{name}.weight", None)


def _replace(
    model: nn.Module, name: str, scheme: QuantizationScheme, packing: str, device: str, requested: str
) -> tuple[str, str]:
    """Put a packed layer in the place of one; returns the backend and the reason for it."""
    old = model.get_submodule(name)
    layer = _described(name, old, scheme, packing)
    if f"{name}.weight" in getattr(model, "all_tied_weights_keys", {}):
        raise ValueError(f"{name} is quantized in the checkpoint but tied to another weight by the model's config")
    own = has_own_forward(old)
    if own and layer.scheme is not None:
        raise ValueError(
            f"{name} is a {type(old).__name__} with a forward of its own: it can be loaded in integers only"
        )
    backend, reason = choose_backend(layer, device, "torch" if own else requested)
    with old.weight.device:
        new = build_layer(backend, layer) if not own else keep_forward(layer, old)
    new.backend_reason = reason
    new.train(old.training)
    model.set_submodule(name, new)
    return backend, reason


def _described(name: str, old: nn.Module, scheme: QuantizationScheme, packing: str) -> PackedLayer:
    """What the checkpoint holds in the place of a layer; what is no plain integers has a packing of its own."""
    rows, columns = old.weight.shape[::-1] if is_transposed(old) else old.weight.shape
    try:
        own_packing = float_packing(scheme)
        stored_as = own_packing or normalize_packing(packing)
    except ValueError as error:
        raise ValueError(f"{name} cannot be loaded: {error}") from error
    size = scheme.group_size[1] if isinstance(scheme.group_size, tuple) else scheme.group_size
    return PackedLayer(
        name,
        rows,
        columns,
        scheme.bits,
        columns if size in (-1, 0) else size,
        scheme.sym,
        stored_as,
        old.weight.dtype,
        getattr(old, "bias", None) is not None,
        scheme if own_packing else None,
    )


def _check_files(
    model: nn.Module, schemes: Mapping[str, QuantizationScheme], packing: str, aliases: Mapping[str, str]
) -> None:
    """Compare the files of a local folder with what is expected of them, by their headers."""
    folder = getattr(model.config, "_name_or_path", "")
    entries = stored_entries(Path(folder)) if folder and Path(folder).is_dir() else {}
    layers = {}
    for name, scheme in schemes.items():
        if scheme.data_type == "int" and scheme.act is None and packing in PACKINGS:
            old = model.get_submodule(name)
            rows, columns = old.weight.shape[::-1] if is_transposed(old) else old.weight.shape
            layers[name] = PackedIntegers(scheme.bits, scheme.group_size, packing, (rows, columns))
    names = _Names(model)
    check_stored(entries, names.resolve, layers, {*aliases, *(schemes.keys() - layers.keys())})
    check_float_shapes(entries, model, names.is_changed, {*aliases, *schemes})


def post_init(model: nn.Module, used_backends: Sequence[str] = ()) -> None:
    """Check that every tensor came, and let backends repack.

    Raises:
        ValueError: tensors are missing or misshapen; the message names the first few.
    """
    errors = []
    settings = _settings(getattr(model.config, "quantization_config", None) or {})
    ordered = not settings.get("desc_act") or settings.get("static_groups")  # groups are of consecutive inputs
    for module in model.modules():
        if isinstance(module, (QuantLinear, PackedLinear)):
            try:
                module.post_init()
                if not ordered and isinstance(module, QuantLinear):
                    module.require_order()
            except ValueError as error:
                errors.append(str(error))
    if errors:
        more = f" (and {len(errors) - 3} more layers)" if len(errors) > 3 else ""
        raise ValueError("; ".join(errors[:3]) + more)
    check_loaded(model)


def _settings(config: Any) -> dict[str, Any]:
    """The quantization config as a mapping: Transformers gives an object whose attributes are the file's keys."""
    settings = dict(config) if isinstance(config, Mapping) else dict(vars(config))
    method = settings.get("quant_method", "auto-round")
    settings["quant_method"] = str(getattr(method, "value", method))
    return settings


def get_layer_config(model: nn.Module, quantization_config: Any) -> dict[str, QuantizationScheme]:
    """Layer name → scheme, for every layer that the config speaks about (16 bits: kept).

    `extra_config` wins over everything, exact names before patterns; then what GPTQ and AWQ configs exclude or
    override; then the top-level scheme for all layers in the blocks.
    """
    settings = _settings(quantization_config)
    names, patterns = _Names(model), Patterns("quantization_config")
    default = _default_scheme(settings)
    schemes = dict.fromkeys(names.in_blocks(settings), default)
    _apply_exclusions(schemes, settings, patterns)
    head = get_lm_head_name(model) if settings.get("lm_head") else None  # how GPTQ configs say it
    if head is not None:
        schemes[head] = default
    _apply_gptq_dynamic(schemes, settings, default, patterns)
    _apply_extra_config(schemes, settings.get("extra_config") or {}, default, names, patterns)
    return schemes


def _default_scheme(settings: Mapping[str, Any]) -> QuantizationScheme:
    fields = _scheme_fields(settings)
    if "zero_point" in settings:  # how AWQ configs say it
        fields["sym"] = not settings["zero_point"]
    return QuantizationScheme(**fields)


def _scheme_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a scheme among those of a configuration; float8 blocks have two sizes, and a key of their own."""
    fields = {key: settings[key] for key in FIELD_NAMES if settings.get(key) is not None}
    block = settings.get("weight_block_size")
    return {**fields, "group_size": block} if block else fields


class _Names:
    """Names of a model's layers, also under the names that they have in the checkpoint.

    A class that loads part of a checkpoint (`AutoModel`, the text part of a multimodal model) has other module paths
    than the config was written for.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = dict(model.named_modules())
        self.layers = dict.fromkeys(name for name, module in self.modules.items() if is_supported_layer(module))
        self.prefix = getattr(model, "base_model_prefix", "")

    def resolve(self, name: str) -> str | None:
        """The module path that a name of the checkpoint means here, or None."""
        candidates = [name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}.")]
        for suffix in ("", ".", ".weight") if name not in self.modules else ():
            renamed = name + suffix
            for rule in self._renamings:
                renamed = rule.rename_source_key(renamed)[0]
            candidates.append(renamed.removesuffix(suffix).removesuffix(".weight"))
        return next((candidate for candidate in candidates if candidate in self.modules), None)

    def is_changed(self, name: str) -> bool:
        """Whether Transformers renames or rearranges a tensor of the checkpoint while loading it."""
        return any(rule.rename_source_key(name)[1] is not None for rule in self._rules)

    @cached_property
    def _rules(self) -> list[WeightTransform]:
        """What Transformers does with checkpoints of this model type."""
        return get_model_conversion_mapping(self.model) if isinstance(self.model, PreTrainedModel) else []

    @property
    def _renamings(self) -> list[WeightRenaming]:
        return [rule for rule in self._rules if isinstance(rule, WeightRenaming)]

    def in_blocks(self, settings: Mapping[str, Any]) -> list[str]:
        """Layers under the block prefixes that a config names, or in all blocks of the model if it names none."""
        prefixes = _block_prefixes(settings)
        if prefixes:
            resolved = [self.resolve(prefix) or prefix for prefix in prefixes]
        else:
            resolved = [block for stack in get_block_names(self.model) for block in stack]
        return [name for name in self.layers if any(_is_under(name, prefix) for prefix in resolved)]


def _is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _block_prefixes(settings: Mapping[str, Any]) -> list[str]:
    """Block prefixes as configs write them: a comma-separated string, a list, or a list of lists of block names."""
    for key in ("quant_block_list", "block_name_to_quantize", "to_quant_block_names"):
        value = settings.get(key)
        if value:
            return [prefix.strip().rstrip(".") for prefix in _flatten(value) if prefix.strip()]
    return []


def _flatten(value: str | Iterable[Any]) -> list[str]:
    if isinstance(value, str):
        return value.split(",")
    return [part for item in value for part in _flatten(item)]


def _apply_exclusions(schemes: dict[str, QuantizationScheme], settings: Mapping[str, Any], patterns: Patterns) -> None:
    """`modules_to_not_convert` (AWQ) rules layers out, `modules_in_block_to_quantize` (GPTQ) all others.

    The first are found anywhere in a name, as AutoAWQ and vLLM do: "mlp.gate" rules "mlp.gate_proj" out, too.
    """
    excluded = _flatten(settings.get("modules_to_not_convert") or [])
    only = _flatten(settings.get("modules_in_block_to_quantize") or [])
    for name in schemes:
        is_excluded = any(part in name or _mentions(part, name, patterns) for part in excluded)
        if is_excluded or (only and not any(_mentions(part, name, patterns) for part in only)):
            schemes[name] = _KEPT


def _mentions(part: str, name: str, patterns: Patterns) -> bool:
    """Whether a pattern finds a name: consecutive whole components, or a search if it is a regular expression."""
    if is_expression(part):
        return patterns.search(part, name)
    return f".{part.strip('.')}." in f".{name}."


def _apply_gptq_dynamic(
    schemes: dict[str, QuantizationScheme],
    settings: Mapping[str, Any],
    default: QuantizationScheme,
    patterns: Patterns,
) -> None:
    """GPTQModel's `dynamic`: "-:pattern" keeps layers, "+:pattern" (or none) overrides fields; the first match wins."""
    rules = []
    for key, fields in (settings.get("dynamic") or {}).items():
        sign, pattern = (key[0], key[2:]) if key[:2] in ("+:", "-:") else ("+", key)
        rules.append((pattern, _KEPT if sign == "-" else _overridden(default, fields, f"dynamic[{key!r}]")))
    for name in schemes:
        found = next((scheme for pattern, scheme in rules if patterns.match(pattern, name)), None)
        schemes[name] = found or schemes[name]


def _apply_extra_config(
    schemes: dict[str, QuantizationScheme],
    extra: Mapping[str, Any],
    default: QuantizationScheme,
    names: _Names,
    patterns: Patterns,
) -> None:
    """Exact names of layers win; other keys are patterns, and a module's name means the layers in it."""
    exact: dict[str, QuantizationScheme] = {}
    for key, fields in extra.items():
        scheme = _overridden(default, fields, f"extra_config[{key!r}]")
        found = names.resolve(key)
        if found in names.layers:
            exact[found] = scheme
            continue
        meant = [name for name in schemes if _mentions(key, name, patterns)]
        schemes.update(dict.fromkeys(meant, scheme))
        if scheme.is_quantized and not meant and found is not None:
            kind = type(names.modules[found]).__name__
            raise ValueError(f"extra_config quantizes {found}, but a {kind} cannot be replaced by a packed layer")
        if scheme.is_quantized and not meant:
            logger.warning("extra_config quantizes %s, which means no layer of %s", key, type(names.model).__name__)
    schemes.update(exact)


def _overridden(default: QuantizationScheme, fields: Mapping[str, Any] | None, where: str) -> QuantizationScheme:
    changes = _scheme_fields(fields or {})
    if (changes.get("bits") or 0) > 8:
        return _KEPT
    try:
        return default.override(**changes)
    except SchemeError as error:
        raise SchemeError(f"quantization_config.{where}: {error}") from error
