"""The front door: `AutoRound(...)` sorts its arguments into settings and returns a compressor for the model."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.auto_scheme import LEGACY, AutoScheme, asked_for
from auto_round.budget import parse_budget
from auto_round.compressors.base import Compressor
from auto_round.compressors.minutes import asked_minutes
from auto_round.compressors.request import Request, Source
from auto_round.formats.engines import EngineProfile, engine
from auto_round.modeling.streaming import StreamedModel
from auto_round.ranks import Ranks, launched, started
from auto_round.schemes import FIELD_NAMES, GGUF_FILES, PRESET_SCHEMES, QuantizationScheme, SchemeError, parse_scheme
from auto_round.settings import AttentionSettings, CalibSettings, SettingsError, TuneSettings
from auto_round.utils.device import device_of_rank, several_devices
from auto_round.utils.model import load_streamed, load_tokenizer, resolve_model_dir

_TUNE = (
    "lr",
    "minmax_lr",
    "momentum",
    "enable_minmax_tuning",
    "enable_quanted_input",
    "not_use_best_mse",
    "dynamic_max_gap",
    "scale_iters",
    "scale_lr",
    "amp",
)
_CALIB = ("dataset", "nsamples", "seqlen", "apply_chat_template", "extra_data_dir", "template", "expert_topup")
_ATTENTION = ("static_kv_dtype", "static_kv_granularity", "static_attention_dtype", "static_attention_granularity")
_PASSED_ON = ("quant_lm_head", "quant_nontext_module", "format", "trust_remote_code", "show_progress")
_AUTO = ("schemes", "target_size", "shared_layers", "ignore_scale_zp_bits", *LEGACY)
_OWN = (
    *_PASSED_ON,
    *_AUTO,
    *_CALIB,
    "minutes",
    "ignore_layers",
    "fp_layers",
    "processor",
    "to_quant_block_names",
    "disable_opt_rtn",
    "enable_opt_rtn",
    "enable_adam",
    "engine",
    "model_dtype",
    "device",
    "alg_configs",
)


class AutoRound:
    """Quantize a model: `AutoRound(model, scheme="W4A16").quantize_and_save("out")`.

    Args:
        model: a model folder, a hub id, or a loaded module (then with `tokenizer`, unless only rounding). A module
            is tuned on the device on which it is.
        tokenizer: a Transformers tokenizer; read from the model's folder when not given.
        scheme: a preset name such as "W4A16", a mapping of scheme fields, or a `QuantizationScheme`; an `AutoScheme`
            chooses among several for each layer, as `schemes="W2A16,W4A16,W8A16"` with `bits=3.0` (or
            `target_size="20GB"`) does.
        layer_config: layer name or pattern → scheme, for layers that differ.
        dataset: None (the calibration text shipped with the package), a file, a hub name, "self" (text that the model
            writes itself), several of them with weights ("self:0.5,builtin:0.5"), texts, token ids, tensors or a data
            loader.
        iters: tuning steps per block; None for 200, 0 rounds to nearest. `minutes=30`, a budget of wall time, picks the
            best iters and scale_iters that fit it by the estimate of the run.
        seqlen, nsamples: size of the calibration set. batch_size, gradient_accumulate_steps: samples per step.
        device_map: where blocks are tuned: 0, "cuda:1", "cpu" …; in a script that torchrun or accelerate starts, each
            rank has its own device, and they tune together.
        seed: everything random follows it.
        max_memory: what the run may use: a size of RAM such as "4GiB", or {"cpu": "4GiB", 0: "20GiB"} with the numbers
            of CUDA devices. Micro-batches and the place of activations follow from it. Another size of micro-batch
            changes results by rounding only, as sums are taken in another order.
        low_gpu_mem_usage: samples' activations wait in RAM or a file, although they would fit on the GPU.
        low_cpu_mem_usage: half of the RAM that is free is left free, by keeping activations in a file.
        platform, enable_torch_compile: accepted for compatibility; the tuning loop needs no compiling.
        **kwargs: scheme fields (bits, group_size, sym …), tuning settings (lr, minmax_lr …), `ignore_layers`,
            `processor`, `extra_data_dir`, `template` (for calibrating on images or audio with text), `expert_topup`
            (candidates for each sample, of which those are used that reach rarely used experts),
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
        max_memory: Any = None,
        **kwargs: Any,
    ) -> Compressor:
        given = locals() | kwargs
        _check_known(kwargs)
        request = _request(given)
        ranks, device = _ranks_and_device(given.get("device") or device_map)
        source = _open_model(given, device)
        _check_tokenizer(model, source, request)
        return Compressor(source, request, ranks)


def _request(given: Mapping[str, Any]) -> Request:
    """What the arguments ask for; everything about them that can be wrong is found here, without the model.

    Raises:
        SettingsError, SchemeError: an argument that is out of range, or arguments that contradict each other.
    """
    if given["platform"] != "hf":
        raise SettingsError(
            f"platform={given['platform']!r} is not supported: give a local folder or a Hugging Face hub id"
        )
    tune, calib = _tune_settings(given), _calib_settings(given)
    attention = AttentionSettings(**_those(given, _ATTENTION))
    target = engine(given["engine"]) if given.get("engine") else None
    budget = parse_budget(given["max_memory"], given["low_gpu_mem_usage"], given["low_cpu_mem_usage"])
    fields = _scheme_fields(given)
    auto = asked_for(given, fields)
    scheme, gguf = (auto.start, None) if auto else _scheme_and_file(given["scheme"], fields, target)
    algorithm = given["algorithm"] or given.get("alg_configs")
    minutes = asked_minutes(given)
    return Request(
        scheme,
        tune,
        calib,
        attention,
        budget,
        layer_config=given["layer_config"],
        ignore_layers=_names(given.get("ignore_layers")) + _names(given.get("fp_layers")),
        blocks=given.get("to_quant_block_names"),
        algorithm=_algorithm(algorithm, given.get("enable_adam"), tune.iters),
        gguf=gguf,
        target=target,
        auto=auto,
        minutes=minutes,
        asked=_asked(given),
        **_those(given, _PASSED_ON),
    )


def _those(given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The arguments of these names that were given; what takes them has the defaults of the others."""
    return {name: given[name] for name in names if name in given}


def _tune_settings(given: Mapping[str, Any]) -> TuneSettings:
    iters = 200 if given["iters"] is None else given["iters"]
    return TuneSettings(
        iters=iters,
        batch_size=min(given["batch_size"], given["nsamples"]),
        gradient_accumulate_steps=given["gradient_accumulate_steps"] or 1,
        search=_search(given.get("disable_opt_rtn"), given.get("enable_opt_rtn"), iters),
        seed=given["seed"],
        **_those(given, _TUNE),
    )


def _calib_settings(given: Mapping[str, Any]) -> CalibSettings:
    return CalibSettings(**_those(given, _CALIB))


def _scheme_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    fields = _those(given, FIELD_NAMES)
    if isinstance(fields.get("bits"), float) and fields["bits"].is_integer():
        fields["bits"] = int(fields["bits"])
    return fields


def _ranks_and_device(device_map: Any) -> tuple[Ranks, torch.device]:
    """The ranks that this process is one of, and the device that it works on.

    Raises:
        SettingsError: several devices, for one process.
    """
    several = several_devices(device_map)
    if several and not launched():
        raise SettingsError(
            f"device_map={device_map!r} names {len(several)} devices, and each needs a process of its own: start the "
            f"script with `torchrun --nproc-per-node {len(several)} SCRIPT`, use the command line "
            "(auto-round MODEL --device_map 0,1), or give one device"
        )
    ranks = started()
    device = device_of_rank(device_map, ranks)
    if device.type == "cuda" and ranks.world > 1:
        torch.cuda.set_device(device)  # where NCCL and what torch allocates without a device belong
    return ranks, device


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


def AutoRoundAdam(*args: Any, **kwargs: Any) -> Compressor:
    """An older name of `AutoRound(…, enable_adam=True)`."""
    return AutoRound(*args, **{"enable_adam": True, **kwargs})


def _check_known(kwargs: Mapping[str, Any]) -> None:
    named = inspect.signature(AutoRound.__new__).parameters.keys() - {"cls", "kwargs"}
    known = (*FIELD_NAMES, *_TUNE, *_ATTENTION, *_OWN, *named)
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"AutoRound got an unknown argument {name!r}{hint}")


def _algorithm(named: str | None, adam: bool | None, iters: int) -> str | None:
    """The algorithm's name: what was asked for by name or by `enable_adam`; None for the usual one."""
    if not adam:
        return named
    if named not in (None, "adam", "adamround"):
        raise SettingsError(f"enable_adam=True and algorithm={named!r} contradict each other: give one")
    return "adamround" if iters else None


def _asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that differ from their defaults."""
    parameters = inspect.signature(AutoRound.__new__).parameters
    usual = {name: parameter.default for name, parameter in parameters.items()}
    if isinstance(given["scheme"], AutoScheme):
        given = {**given, "scheme": "W4A16", **given["scheme"].arguments()}
    return {
        name: value
        for name, value in given.items()
        if name not in ("cls", "kwargs")
        and (name not in usual or type(value) is not type(usual[name]) or value != usual[name])
    }


def _search(disabled: bool | None, enabled: bool | None, iters: int) -> bool:
    """Whether scales are searched: optimized round-to-nearest unless it is switched off; tuning starts from it too."""
    if disabled and enabled:
        raise SettingsError("disable_opt_rtn and enable_opt_rtn contradict each other: give one")
    return True if iters else not disabled


def _open_model(given: Mapping[str, Any], device: torch.device) -> Source:
    """The model with its tokenizer; a folder or hub id is opened, an object is taken as it is."""
    model, tokenizer, processor = given["model"], given["tokenizer"], given.get("processor")
    if isinstance(model, nn.Module):
        return Source(_loaded(model), tokenizer, processor, None, _short_name(model))
    if isinstance(model, StreamedModel):
        return Source(model, tokenizer, processor, model.checkpoint.directory, _short_name(model))
    trust = given.get("trust_remote_code", False)
    directory = resolve_model_dir(str(model), trust)
    streamed = load_streamed(directory, trust, known_dtype(given.get("model_dtype")), device)
    return Source(streamed, tokenizer or load_tokenizer(directory, trust), processor, directory, _short_name(model))


def _loaded(model: nn.Module) -> StreamedModel:
    """A model that came as an object.

    Raises:
        SettingsError: its weights are not in memory, or in a dtype whose scales lie elsewhere.
    """
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
    return StreamedModel(model, None, parameter.device)


def _check_tokenizer(model: Any, source: Source, request: Request) -> None:
    if source.tokenizer is None and request.needs_data and _needs_tokenizer(request.calib.dataset):
        raise SettingsError(
            f"{model if source.directory else 'the model'} has no tokenizer, which calibrating on text needs: put "
            "its files into the folder, pass tokenizer=…, give dataset= as token ids, or round to nearest without data "
            "(iters=0, disable_opt_rtn=True; auto-round-rtn)"
        )


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


def known_dtype(name: Any) -> torch.dtype | None:
    """The dtype that `model_dtype` names; None for the one that the model is stored in.

    Raises:
        SettingsError: there is none of that name.
    """
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
