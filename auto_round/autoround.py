"""The front door: `AutoRound(...)` sorts its arguments into settings and returns a compressor for the model."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.compressors.base import Compressor
from auto_round.formats.engines import EngineProfile, engine
from auto_round.modeling.streaming import StreamedModel
from auto_round.schemes import FIELD_NAMES, GGUF_FILES, PRESET_SCHEMES, QuantizationScheme, SchemeError, parse_scheme
from auto_round.settings import AttentionSettings, CalibSettings, SettingsError, TuneSettings
from auto_round.utils.device import pick_device
from auto_round.utils.model import load_streamed, load_tokenizer, resolve_model_dir

_TUNE = (
    "lr",
    "minmax_lr",
    "momentum",
    "enable_minmax_tuning",
    "enable_quanted_input",
    "not_use_best_mse",
    "dynamic_max_gap",
    "amp",
)
_ATTENTION = ("static_kv_dtype", "static_kv_granularity", "static_attention_dtype", "static_attention_granularity")
_OWN = (
    "ignore_layers",
    "fp_layers",
    "quant_lm_head",
    "quant_nontext_module",
    "processor",
    "extra_data_dir",
    "template",
    "to_quant_block_names",
    "disable_opt_rtn",
    "enable_opt_rtn",
    "trust_remote_code",
    "format",
    "engine",
    "model_dtype",
    "apply_chat_template",
    "show_progress",
    "device",
    "alg_configs",
)


class AutoRound:
    """Quantize a model: `AutoRound(model, scheme="W4A16").quantize_and_save("out")`.

    Args:
        model: a model folder, a hub id, or a loaded module (then with `tokenizer`, unless only rounding). A module
            is tuned on the device on which it is.
        tokenizer: a Transformers tokenizer; read from the model's folder when not given.
        scheme: a preset name such as "W4A16", a mapping of scheme fields, or a `QuantizationScheme`.
        layer_config: layer name or pattern → scheme, for layers that differ.
        dataset: None (the calibration text shipped with the package), a file, a hub name, texts, token ids, tensors
            or a data loader.
        iters: tuning steps per block; None for 200, 0 rounds to nearest.
        seqlen, nsamples: size of the calibration set. batch_size, gradient_accumulate_steps: samples per step.
        device_map: where blocks are tuned: 0, "cuda:1", "cpu" …
        seed: everything random follows it.
        platform, low_gpu_mem_usage, low_cpu_mem_usage, enable_torch_compile: accepted for compatibility; memory is
            bounded by a block in any case, and the tuning loop needs no compiling.
        **kwargs: scheme fields (bits, group_size, sym …), tuning settings (lr, minmax_lr …), `ignore_layers`,
            `processor`, `extra_data_dir`, `template` (for calibrating on images or audio with text),
            `quant_lm_head`, `quant_nontext_module` (vision and audio towers too), `to_quant_block_names`,
            `disable_opt_rtn`, `trust_remote_code`, `format`, `model_dtype`; `static_kv_dtype="fp8"` and
            `static_attention_dtype="fp8"` (with `…_granularity` "tensor" or "head") for fixed scales of the KV cache
            and of attention, in the formats auto_round and llm_compressor.

    Returns:
        A `Compressor`; there are no `AutoRound` instances.

    Raises:
        TypeError: an unknown argument; the message names the nearest known one.
        SchemeError, SettingsError, PlanError, CheckpointError: bad input, before any work.
    """

    def __new__(
        cls,
        model: str | Path | nn.Module,
        tokenizer: Any = None,
        platform: str = "hf",
        scheme: str | Mapping[str, Any] | QuantizationScheme = "W4A16",
        layer_config: Mapping[str, Any] | None = None,
        dataset: Any = None,
        iters: int | None = None,
        seqlen: int = 2048,
        nsamples: int = 128,
        batch_size: int = 8,
        gradient_accumulate_steps: int | None = None,
        low_gpu_mem_usage: bool = False,
        device_map: Any = 0,
        enable_torch_compile: bool | None = None,
        seed: int = 42,
        low_cpu_mem_usage: bool = True,
        algorithm: str | None = None,
        **kwargs: Any,
    ) -> Compressor:
        _check_known(kwargs)
        if platform != "hf":
            raise SettingsError(f"platform={platform!r} is not supported: give a local folder or a Hugging Face hub id")
        fields = {name: kwargs.pop(name) for name in FIELD_NAMES if name in kwargs}
        if isinstance(fields.get("bits"), float) and fields["bits"].is_integer():
            fields["bits"] = int(fields["bits"])
        iters = 200 if iters is None else iters
        tune = TuneSettings(
            iters=iters,
            batch_size=min(batch_size, nsamples),
            gradient_accumulate_steps=gradient_accumulate_steps or 1,
            search=_search(kwargs, iters),
            seed=seed,
            **{name: kwargs.pop(name) for name in _TUNE if name in kwargs},
        )
        calib = CalibSettings(
            dataset,
            nsamples,
            seqlen,
            kwargs.pop("apply_chat_template", False),
            kwargs.pop("extra_data_dir", None),
            kwargs.pop("template", None),
        )
        attention = AttentionSettings(**{name: kwargs.pop(name) for name in _ATTENTION if name in kwargs})
        target = engine(kwargs["engine"]) if kwargs.get("engine") else None
        parsed, gguf = _scheme_and_file(scheme, fields, target)
        trust = kwargs.pop("trust_remote_code", False)
        device = pick_device(kwargs.pop("device", None) or device_map)
        streamed, tokenizer, source = _open_model(model, tokenizer, trust, kwargs.pop("model_dtype", None), device)
        needs_data = tune.needs_data or parsed.needs_input_range or attention.scaled
        if tokenizer is None and needs_data and _needs_tokenizer(dataset):
            raise SettingsError(
                f"{model if source else 'the model'} has no tokenizer, which calibrating on text needs: put its files "
                "into the folder, pass tokenizer=…, give dataset= as token ids, or round to nearest without data "
                "(iters=0, disable_opt_rtn=True; auto-round-rtn)"
            )
        compressor = Compressor(
            streamed,
            tokenizer,
            parsed,
            tune,
            calib,
            attention=attention,
            source_dir=source,
            layer_config=layer_config,
            ignore_layers=_names(kwargs.get("ignore_layers")) + _names(kwargs.get("fp_layers")),
            to_quant_block_names=kwargs.get("to_quant_block_names"),
            quant_lm_head=kwargs.get("quant_lm_head", False),
            quant_nontext_module=kwargs.get("quant_nontext_module", False),
            processor=kwargs.get("processor"),
            algorithm_name=algorithm or kwargs.get("alg_configs"),
            show_progress=kwargs.get("show_progress", True),
            trust_remote_code=trust,
            name=_short_name(model),
            gguf=gguf,
            target=target,
        )
        usual = f"gguf:{gguf.lower()}" if gguf else target.choose_format(parsed) if target else "auto_round"
        compressor.default_format = kwargs.get("format") or usual
        return compressor


def _scheme_and_file(
    scheme: Any, fields: Mapping[str, Any], target: EngineProfile | None
) -> tuple[QuantizationScheme, str | None]:
    """The scheme, and the file type of llama.cpp that its name means: its mixture of tensor types comes with it."""
    parsed = parse_scheme(scheme, **fields)
    name = scheme.strip().upper() if isinstance(scheme, str) else ""
    kind = name.removeprefix("GGUF:")
    if name.startswith("GGUF:") and kind in GGUF_FILES:
        if parsed != PRESET_SCHEMES[name]:
            changed = ", ".join(fields)
            raise SchemeError(
                f"{name} is a mixture of llama.cpp's types, which {changed} cannot change: use layer_config"
            )
        return parsed, kind
    if target is not None and target.name == "llama.cpp" and parsed == PRESET_SCHEMES["W4A16"]:
        return PRESET_SCHEMES["GGUF:Q4_K_M"], "Q4_K_M"  # the default scheme is no number format of llama.cpp
    return parsed, None


def AutoRoundLLM(*args: Any, **kwargs: Any) -> Compressor:
    """An older name of `AutoRound`."""
    return AutoRound(*args, **kwargs)


def AutoRoundMLLM(*args: Any, **kwargs: Any) -> Compressor:
    """An older name of `AutoRound`: whether a model takes images or audio is seen from the model and the dataset."""
    return AutoRound(*args, **kwargs)


def _check_known(kwargs: Mapping[str, Any]) -> None:
    named = inspect.signature(AutoRound.__new__).parameters.keys() - {"cls", "kwargs"}
    known = (*FIELD_NAMES, *_TUNE, *_ATTENTION, *_OWN, *named)
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"AutoRound got an unknown argument {name!r}{hint}")


def _search(kwargs: dict[str, Any], iters: int) -> bool:
    """Whether scales are searched: optimized round-to-nearest unless it is switched off; tuning starts from it too."""
    disabled, enabled = kwargs.pop("disable_opt_rtn", None), kwargs.pop("enable_opt_rtn", None)
    if disabled and enabled:
        raise SettingsError("disable_opt_rtn and enable_opt_rtn contradict each other: give one")
    return True if iters else not disabled


def _open_model(
    model: Any, tokenizer: Any, trust_remote_code: bool, dtype: Any, device: torch.device
) -> tuple[StreamedModel, Any, Path | None]:
    if isinstance(model, nn.Module):
        parameter = next(model.parameters(), None)
        if parameter is None or parameter.device.type == "meta":
            raise SettingsError("the model given as an object has no weights in memory: give its folder instead")
        coded = next((n for n, p in model.named_parameters() if p.dtype.itemsize == 1), None)
        if coded is not None:
            raise SettingsError(
                f"the model given as an object holds {coded} in {model.get_parameter(coded).dtype}, whose scales lie "
                "elsewhere: give its folder instead, from which stored FP8 and FP4 weights are read as floats"
            )
        model.eval().requires_grad_(False)
        return StreamedModel(model, None, parameter.device), tokenizer, None
    if isinstance(model, StreamedModel):
        return model, tokenizer, model.checkpoint.directory
    directory = resolve_model_dir(str(model), trust_remote_code)
    streamed = load_streamed(directory, trust_remote_code, _dtype(dtype), device)
    return streamed, tokenizer or load_tokenizer(directory, trust_remote_code), directory


def _short_name(model: Any) -> str:
    """What output folders are called after: the last part of the folder or hub id, or the model's class."""
    if isinstance(model, nn.Module):
        path = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
        return Path(path).name or type(model).__name__.lower()
    if isinstance(model, StreamedModel):
        return model.checkpoint.directory.resolve().name
    return Path(str(model)).expanduser().resolve().name


_DTYPES = {
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def _dtype(name: Any) -> torch.dtype | None:
    if name is None or isinstance(name, torch.dtype):
        return name
    if str(name) not in _DTYPES:
        raise SettingsError(f"model_dtype={name!r} is not known: use {', '.join(_DTYPES)}")
    return _DTYPES[str(name)]


def _needs_tokenizer(dataset: Any) -> bool:
    """Text needs a tokenizer; token ids and tensors do not."""
    if dataset is None or isinstance(dataset, (str, Path)):
        return True
    return isinstance(dataset, Sequence) and bool(dataset) and isinstance(dataset[0], str)


def _names(value: str | Sequence[str] | None) -> list[str]:
    """A comma-separated string, or a list, of layer names."""
    if not value:
        return []
    items = value.split(",") if isinstance(value, str) else value
    return [item.strip() for item in items if item.strip()]
