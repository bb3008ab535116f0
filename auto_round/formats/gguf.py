"""The `gguf:*` formats: one file that llama.cpp opens, with the model's configuration and its tokenizer inside.

The `gguf` package writes the layout and knows the names; blocks of numbers come from `gguf_blocks.py`, facts about
architectures from `gguf_models.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from auto_round.data_type.base import QuantizedTensor
from auto_round.formats.base import ExportFormat, TensorShape
from auto_round.formats.export import Ledger
from auto_round.formats.gguf_blocks import pack, row_bytes, unpack
from auto_round.formats.gguf_models import Family, Names, hyper_parameters, load_gguf
from auto_round.formats.gguf_tensors import GgufTensor, check_stacks, layer_kind, list_tensors, read_tensors
from auto_round.formats.gguf_tokenizer import tokenizer_values
from auto_round.logger import logger
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import LayerInfo, LayerPlan, ModelPlan, PlanError
from auto_round.schemes import GGUF_FILES
from auto_round.store import Store

QUANTIZATION_VERSION = 2  # of the layout of ggml's blocks
METADATA = 64 << 20  # bytes allowed for what stands before the tensors: the vocabulary


class GgufFormat(ExportFormat):
    """A GGUF file of one of llama.cpp's file types.

    Raises:
        PlanError: a model that llama.cpp does not compute, or a layer in none of its tensor types.
    """

    def __init__(self, plan: ModelPlan, name: str = "gguf:q4_k_m"):
        self.plan = plan
        self.name = name
        self.file_type = name.partition(":")[2].upper()
        if self.file_type not in GGUF_FILES:
            raise PlanError(f"there is no format {name!r}; known: gguf:{', gguf:'.join(GGUF_FILES).lower()}")
        self.names = Names(plan.config)
        _warn_of_window(self.names.family, plan.config)
        for layer in plan.quantized().values():
            layer_kind(layer)
        check_stacks(plan, self.names)

    def layout(self, layer: LayerPlan) -> dict[str, TensorShape]:
        info = layer.info
        return {"weight": TensorShape((info.out_features, row_bytes(layer_kind(layer), info.in_features)), torch.uint8)}

    def pack(self, tensor: QuantizedTensor, info: LayerInfo) -> dict[str, torch.Tensor]:
        return {"weight": pack(tensor)}

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: LayerPlan) -> QuantizedTensor | None:
        return unpack(tensors["weight"], layer_kind(layer), layer.info.in_features)

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        return None

    def write_folder(
        self,
        folder: Path,
        streamed: StreamedModel,
        plan: ModelPlan,
        store: Store,
        *,
        source_dir: Path | None,
        tokenizer: Any = None,
        settings: Mapping[str, Any],
        max_shard_size: int | str = "5GB",
    ) -> Ledger:
        """Write `{model}-{file type}.gguf`; a GGUF file is never cut into shards here.

        Raises:
            OSError: too little disk space, before anything is written. PlanError: a parameter without a place.
        """
        tensors = list_tensors(streamed, plan, self.names)
        ledger = make_ledger(streamed, plan, tensors)
        name = model_name(source_dir, plan.config)
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, tensors)
        file = folder / f"{name}-{self.file_type}.gguf"
        partial = file.with_suffix(".gguf.partial")
        try:
            vocabulary = tokenizer_values(tokenizer, source_dir, plan.config)
            with contextlib.closing(self._begin(partial, name, tensors, vocabulary)) as writer:
                for _, data in read_tensors(streamed, plan, store, tensors):
                    writer.write_tensor_data(data)
            _finish(partial, file)
        finally:
            partial.unlink(missing_ok=True)
        return ledger

    def _begin(self, file: Path, name: str, tensors: list[GgufTensor], vocabulary: Mapping[str, Any]) -> Any:
        """A writer whose header is on disk and that takes the tensors' bytes in order."""
        gguf = load_gguf()
        writer = gguf.GGUFWriter(None, self.names.family.arch)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
        writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
        for method, value in {**hyper_parameters(self.plan.config), **vocabulary}.items():
            getattr(writer, f"add_{method}")(value)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{self.file_type}"])
        writer.add_quantization_version(QUANTIZATION_VERSION)
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return writer


def _warn_of_window(family: Family, config: Any) -> None:
    """llama.cpp lets some models see everything that Transformers shows them through a window."""
    window = getattr(config, "sliding_window", None)
    if window and not family.windows and window < config.max_position_embeddings:
        logger.warning(
            "llama.cpp knows no sliding window for %s models: beyond %d tokens its results differ from Transformers'",
            family.arch,
            window,
        )


def model_name(source_dir: Path | None, config: Any) -> str:
    """What the model is called: its folder, or the repository of a download cache; "model" where neither is known."""
    name = str(source_dir or getattr(config, "_name_or_path", "") or "model")
    cached = re.search(r"models--(?:.*--)?([^/]+)/snapshots/", name)
    return cached[1] if cached else Path(name).name


def make_ledger(streamed: StreamedModel, plan: ModelPlan, tensors: list[GgufTensor]) -> Ledger:
    """What became of every tensor of the source."""
    ledger = Ledger()
    made = {parameter: tensor for tensor in tensors for parameter in tensor.parameters}
    parameters = {stored: parameter for parameter, stored in streamed.names.direct.items()}
    grouped = {source for group in streamed.names.groups.values() for source in group.sources}
    source = streamed.source_tensors()
    for name in source:
        parameter = parameters.get(name)
        if name in grouped:
            ledger.add(name, "transformed", "written as other tensors")
        elif parameter in streamed.ties:
            ledger.add(name, "tied", f"is {streamed.ties[parameter]}")
        elif parameter not in made:
            ledger.add(name, "dropped", "llama.cpp has no use for it")
        else:
            ledger.add(name, *_fate(made[parameter], plan, parameter))
    ledger.close(source)
    for name, reason in getattr(streamed.checkpoint, "dropped", {}).items():
        if name not in ledger.fates:
            ledger.add(name, "dropped", reason)
    return ledger


def _fate(tensor: GgufTensor, plan: ModelPlan, parameter: str) -> tuple[str, str]:
    layer = plan.layers.get(parameter.removesuffix(".weight"))
    if tensor.is_quantized:
        return "quantized", f"{tensor.kind} {tensor.name}; {layer.reason}"
    why = f"{tensor.kind} {tensor.name}" + (f"; {layer.reason}" if layer is not None else "")
    changed = tensor.edit or len(tensor.parameters) > 1
    return ("transformed", f"{why}; {tensor.edit or 'stacked'}") if changed else ("kept", why)


def _check_space(folder: Path, tensors: list[GgufTensor]) -> None:
    needed = sum(tensor.nbytes for tensor in tensors) + METADATA
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free, and the GGUF file needs {needed / 1e9:.1f} GB: make room or "
            "choose another output folder"
        )


def _finish(partial: Path, file: Path) -> None:
    """Give the file its name once it is on the disk."""
    for path in (partial, file.parent):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if path == partial:
            partial.replace(file)
