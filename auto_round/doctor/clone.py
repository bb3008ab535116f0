"""The patient: a configuration from wherever it is given, and a tiny random model of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from auto_round.doctor.tiny import build, tiny_config
from auto_round.modeling.reading import CheckpointError, read_json
from auto_round.utils.model import load_config, model_class

LARGEST_EXTRA = 64 << 20  # bytes
_NOT_COPIED = (".safetensors", ".gguf", ".json", ".py", ".md", ".txt", ".bin", ".h5", ".msgpack", ".onnx")


@dataclass
class Source:
    """A configuration, the folder that it (and its code) came from, and the class to build where that is given."""

    config: PreTrainedConfig
    folder: Path | None = None
    kind: Any = None


def read_source(model: Any, work: Path, trust_remote_code: bool = False) -> Source:
    """The configuration of a folder, a hub id, a JSON file, a configuration or a model.

    Raises:
        CheckpointError: it is none of these, or cannot be read; the message says what to do.
    """
    if isinstance(model, PreTrainedModel):
        return Source(model.config, None, type(model))
    if isinstance(model, PreTrainedConfig):
        return Source(model)
    if not isinstance(model, (str, Path)):
        raise CheckpointError(f"a {type(model).__name__} has no configuration to build a clone from")
    path = Path(model).expanduser()
    if path.is_file():
        path = _as_folder(path, work)
    elif not path.is_dir():
        path = _download(str(model), trust_remote_code)
    return Source(load_config(path, trust_remote_code), path)


def _as_folder(file: Path, work: Path) -> Path:
    """A folder with this file as its config.json: the file's own if it is called so, with the code beside it."""
    if file.name == "config.json":
        return file.parent
    folder = work / "config"
    folder.mkdir(parents=True, exist_ok=True)
    fields = read_json(file)
    if isinstance(fields.get("config"), dict) and "model_type" in fields:  # a file of a collection of configurations
        fields = {"model_type": fields["model_type"], **fields["config"]}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def _download(name: str, trust_remote_code: bool) -> Path:
    """The configuration (and the code, if trusted) of a hub id; no weights."""
    from huggingface_hub import snapshot_download

    if Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise CheckpointError(f"{name} is neither a folder nor a file: check the path")
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", *(["*.py"] if trust_remote_code else [])]))
    except Exception as error:  # the hub's errors, the network's, and those of a malformed id
        raise CheckpointError(
            f"{name!r} is neither a folder, a config.json nor a hub model that can be reached "
            f"({type(error).__name__}): check the spelling and the network"
        ) from error


def class_of(source: Source, trust_remote_code: bool = False) -> Any:
    """The class that AutoRound would load; of a model with code of its own, the one that `auto_map` names."""
    if source.kind is not None:
        return source.kind
    found = model_class(source.config)
    reference = (getattr(source.config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if reference is None or not hasattr(found, "_model_mapping"):
        return found
    if not trust_remote_code or source.folder is None:
        raise CheckpointError("the model brings its own code, which is not run unless you pass --trust_remote_code")
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    kind = get_class_from_dynamic_module(reference, str(source.folder))
    # So that saving copies the code beside the weights.
    kind.register_for_auto_class("AutoModelForCausalLM")
    type(source.config).register_for_auto_class()
    return kind


def make_clone(source: Source, trust_remote_code: bool = False) -> PreTrainedModel:
    """A tiny random model of a configuration."""
    kind = class_of(source, trust_remote_code)
    return build(tiny_config(source.config), kind)


def tiny_clone(model: Any, trust_remote_code: bool = False) -> PreTrainedModel:
    """A tiny random clone of the architecture of a folder, a hub id, a JSON file or a configuration."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="auto_round_") as work:
        return make_clone(read_source(model, Path(work), trust_remote_code), trust_remote_code)


def save_clone(model: PreTrainedModel, folder: Path, beside: Path | None = None) -> Path:
    """Write a clone where nothing else is, with the small files of its source that some classes load besides."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    for file in sorted(beside.iterdir()) if beside is not None else ():
        extra = file.is_file() and file.suffix not in _NOT_COPIED and not file.name.startswith((".", "pytorch_model"))
        if extra and file.stat().st_size < LARGEST_EXTRA and not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder
