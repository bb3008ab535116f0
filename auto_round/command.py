"""The `auto-round` line that repeats a run, however it was started, for its report.

Options of the command are called like the arguments of `AutoRound`; those that differ are named here.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_SILENT = ("show_progress", "platform")  # do not change the result
_LISTS = ("schemes", "ignore_layers", "fp_layers", "to_quant_block_names")
_FILES = ("dataset", "extra_data_dir", "template")
_NAMES = {
    "engine": "for",
    "options": "schemes",
    "avg_bits": "bits",
    "target_bits": "bits",
    "device": "device_map",
    "alg_configs": "algorithm",
}
_OFF = {
    "sym": "--asym",
    "act_sym": "--act_asym",
    "act_dynamic": "--disable_act_dynamic",
    "amp": "--disable_amp",
    "low_cpu_mem_usage": "--disable_low_cpu_mem_usage",
    "enable_minmax_tuning": "--disable_minmax_tuning",
    "enable_quanted_input": "--disable_quanted_input",
    "enable_torch_compile": "--disable_torch_compile",
    "disable_opt_rtn": "--enable_opt_rtn",
    "enable_opt_rtn": "--disable_opt_rtn",
    "not_use_best_mse": "--no-not_use_best_mse",
    "enable_adam": "--no-enable_adam",
    "quant_lm_head": "--no-quant_lm_head",
    "quant_nontext_module": "--no-quant_nontext_module",
}
_ALREADY_OFF = ("ignore_scale_zp_bits", "apply_chat_template", "trust_remote_code", "low_gpu_mem_usage")
_ALREADY_ON = ("act_dynamic", "amp")


def command_line(
    asked: Mapping[str, Any] | None,
    output: Path,
    formats: Sequence[str],
    max_shard_size: int | str | None = None,
    force: bool = False,
) -> str | None:
    """The line, quoted for a shell; None where an argument is an object that no line can hold.

    asked: arguments of `AutoRound`; output: the folder of results.
    """
    if asked is None:
        return None
    given = dict(asked)
    words = ["auto-round", _path(given.pop("model"))]
    kept = {name: value for name, value in given.items() if value is not None and name not in (*_SILENT, "format")}
    try:
        words += [word for name, value in kept.items() for word in _option(name, value)]
    except TypeError:
        return None
    if not isinstance(words[1], str):
        return None
    words += [f"--format={','.join(formats)}", f"--output_dir={output}"]
    words += [f"--max_shard_size={max_shard_size}"] if max_shard_size is not None else []
    return shlex.join([*words, *(["--force"] if force else [])])


def _option(name: str, value: Any) -> list[str]:
    """An argument as options.

    Raises:
        TypeError: its value cannot be written as one.
    """
    option = f"--{_NAMES.get(name, name)}"
    if value is True:
        return [] if name in _ALREADY_ON else [option]
    if value is False:
        return [] if name in _ALREADY_OFF else [_OFF[name]] if name in _OFF else [f"--disable_{name}"]
    if name == "shared_layers":
        return [f"{option}={','.join(group)}" for group in value]
    if name == "layer_config":
        return [f"{option}={json.dumps(value)}"]
    if name == "max_memory" and isinstance(value, Mapping):
        return [f"{option}={','.join(f'{where}={size}' for where, size in value.items())}"]
    if name in _LISTS and isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        return [f"{option}={value if isinstance(value, str) else ','.join(value)}"]
    if name in _FILES and isinstance(value, (str, Path)):
        return [f"{option}={_path(value)}"]
    if isinstance(value, (torch.dtype, torch.device)):
        return [f"{option}={str(value).removeprefix('torch.')}"]
    if isinstance(value, (str, int, float, Path)):
        return [f"{option}={value}"]
    raise TypeError(f"{name} is an object")


def _path(value: Any) -> Any:
    """A path from wherever the line is run; a hub id, or an object, as it is."""
    path = Path(value).expanduser() if isinstance(value, (str, Path)) else None
    return str(path.absolute()) if path is not None and path.exists() else value
