"""A model of which only the configuration and the headers of its weight files are read.

That is enough to plan a run: the module tree comes from the configuration, shapes and dtypes from the headers. Of a
model on the hub these are kilobytes, fetched by range requests into a temporary folder.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from auto_round.modeling.checkpoint import CheckpointError
from auto_round.modeling.streaming import StreamedModel
from auto_round.utils.model import build_empty, load_config, main_dtype, open_source

SMALL_FILES = ("config.json", "tokenizer_config.json")


class HeaderModel(StreamedModel):
    """A model without any weights. Its blocks are known, and cannot be run."""

    def set_blocks(self, blocks: Sequence[str]) -> None:
        """Declare what would stream."""
        self.blocks = tuple(blocks)

    def load(self, block: str) -> nn.Module:
        """Refuse: nothing can be loaded.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{block} cannot be loaded: of {self.checkpoint.directory} only headers are read")


@contextlib.contextmanager
def open_headers(
    model: str, trust_remote_code: bool, dtype: torch.dtype | None, device: torch.device
) -> Iterator[HeaderModel]:
    """The model of a folder, or of a hub id, for as long as the context is open.

    Raises:
        CheckpointError: neither a folder nor a hub id that can be reached, or headers that cannot be understood.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        yield _open(path, trust_remote_code, dtype, device)
        return
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise CheckpointError(f"the model folder {model} does not exist")
    with tempfile.TemporaryDirectory(prefix="auto_round_plan_") as folder:
        target = Path(folder) / model.rpartition("/")[2]
        target.mkdir()
        _fetch(model, target, trust_remote_code)
        yield _open(target, trust_remote_code, dtype, device)


def _open(directory: Path, trust: bool, dtype: torch.dtype | None, device: torch.device) -> HeaderModel:
    config = load_config(directory, trust)
    try:
        checkpoint = open_source(directory, dtype, headers_only=True)
    except CheckpointError as error:
        if not isinstance(error.__cause__, SafetensorError):
            raise
        raise CheckpointError(
            f"{directory}: the shapes of its quantized weights are stored among the weights, and only headers are "
            f"there ({error}): give a folder that holds the whole model"
        ) from error
    model = build_empty(config, dtype or main_dtype(checkpoint), trust)
    return HeaderModel(model, checkpoint, device)


def _fetch(model: str, target: Path, trust_remote_code: bool) -> None:
    """Put a hub model's small files, and weight files that end after their headers, into a folder."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
    )

    try:
        _fetch_small(model, target, hf_hub_download, EntryNotFoundError)
        if trust_remote_code:
            for name in HfApi().list_repo_files(model):
                if name.endswith(".py"):
                    hf_hub_download(model, name, local_dir=target)
        found = HfApi().get_safetensors_metadata(model)
    except NotASafetensorsRepoError as error:
        raise CheckpointError(f"{model} has no safetensors weights: give a model that has") from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"{model!r} is neither a local folder nor a hub model that can be reached ({type(error).__name__}): "
            "check the spelling and the network, or download it and give its folder"
        ) from error
    write_headers(target, found)


def _fetch_small(model: str, target: Path, download: Any, missing: type[Exception]) -> None:
    for name in SMALL_FILES:
        try:
            download(model, name, local_dir=target)
        except missing:
            if name == "config.json":
                raise CheckpointError(f"{model} has no config.json: it is not a Transformers model") from None


def write_headers(target: Path, found: Any) -> None:
    """Write weight files that hold a header each, and their index.

    found: `huggingface_hub.SafetensorsRepoMetadata`. The layout is that of the safetensors specification: eight bytes
    of length, little-endian, then JSON.

    Raises:
        CheckpointError: a file's name leads out of the folder.
    """
    for name, file in found.files_metadata.items():
        if Path(name).name != name or "\\" in name:
            raise CheckpointError(f"the index names a weight file outside its folder: {name!r}")
        header = {
            tensor: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            for tensor, info in file.tensors.items()
        }
        text = json.dumps(header).encode()
        (target / name).write_bytes(len(text).to_bytes(8, "little") + text)
    if found.sharded:
        index = {"weight_map": dict(found.weight_map)}
        (target / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
