"""Reads layers of an MLX folder with NumPy, from the description of that format.

It shares no code with the writer but mlx-lm's names. Widths and groups come from the tensors' shapes and must be those
that config.json states, as mlx-lm takes them from either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from auto_round.formats.mlx_models import EXPERT_NAMES, ExpertNames
from auto_round.modeling.checkpoint import Checkpoint, CheckpointError, TensorEntry
from auto_round.verify.packed import stream_codes

SCALES = ".scales"


class UnstackedCheckpoint(Checkpoint):
    """A folder in which experts are stacked, shown with the tensors of every layer under the source's names.

    Attributes:
        stacked: shown name → (stored name, slice of its first dimension or None), where the two differ.
    """

    def __init__(self, directory: str | Path, names: ExpertNames):
        super().__init__(directory)
        self.stacked: dict[str, tuple[str, int | None]] = {}
        shown: dict[str, TensorEntry] = {}
        for name, entry in self.entries.items():
            stem, _, suffix = name.rpartition(".")
            count = entry.shape[0] if entry.shape else 0
            for layer, index in names.sources(stem, count):
                found = f"{layer}.{suffix}" if stem else name
                if found in shown:
                    raise CheckpointError(f"{self.directory}: {found!r} is there twice, alone and inside {name!r}")
                shown[found] = entry if index is None else _slice(entry, index)
                if found != name:
                    self.stacked[found] = (name, index)
        self.entries = shown

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by name; of a stack, only the bytes of the slice are read."""
        names = list(names)
        tensors = super().read([name for name in names if name not in self.stacked])
        return {name: self._part(name) if name in self.stacked else tensors[name] for name in names}

    def _part(self, name: str) -> torch.Tensor:
        stored, index = self.stacked[name]
        with safe_open(self.entries[name].file, framework="pt") as handle:
            return handle.get_tensor(stored) if index is None else handle.get_slice(stored)[index]


def _slice(entry: TensorEntry, index: int) -> TensorEntry:
    size = entry.nbytes // entry.shape[0]
    begin = entry.begin + index * size
    return TensorEntry(entry.file, entry.shape[1:], entry.dtype, begin, begin + size)


def open_mlx(folder: str | Path, model_type: str | None) -> Checkpoint:
    """The tensors of an MLX folder, under the names of the source."""
    names = EXPERT_NAMES.get(model_type)
    return Checkpoint(folder) if names is None else UnstackedCheckpoint(folder, names)


def is_mlx(quantization: Mapping[str, Any] | None) -> bool:
    """Whether a `quantization_config` is MLX's, which names no method."""
    return (
        quantization is not None and "quant_method" not in quantization and {"bits", "group_size"} <= set(quantization)
    )


def mlx_layers(checkpoint: Checkpoint) -> list[str]:
    """Names of the packed layers."""
    return [name.removesuffix(SCALES) for name in checkpoint.names() if name.endswith(SCALES)]


def mlx_problem(checkpoint: Checkpoint, quantization: Mapping[str, Any]) -> str | None:
    """A packed layer that lacks a tensor, or whose tensors are not what the configuration states."""
    packed, stems = mlx_layers(checkpoint), set()
    for layer in packed:
        stems.add(_stem(checkpoint, layer))
        missing = [suffix for suffix in ("weight", "biases") if f"{layer}.{suffix}" not in checkpoint]
        if missing:
            return f"{layer} has no {missing[0]}"
        try:
            _shape(checkpoint, quantization, layer)
        except CheckpointError as error:
            return str(error)
    stray = [name for name, entry in quantization.items() if isinstance(entry, dict) and name not in stems]
    return f"{stray[0]} has an entry in the configuration, and is not packed" if stray else None


def _stem(checkpoint: Checkpoint, layer: str) -> str:
    """The name under which a packed layer stands, alone or with others."""
    if not isinstance(checkpoint, UnstackedCheckpoint):
        return layer
    stored, _ = checkpoint.stacked.get(f"{layer}{SCALES}", (f"{layer}{SCALES}", None))
    return stored.removesuffix(SCALES)


def _shape(checkpoint: Checkpoint, quantization: Mapping[str, Any], layer: str) -> tuple[int, int]:
    """(bits, inputs) of a packed layer."""
    stated = quantization.get(_stem(checkpoint, layer), quantization)
    if stated is False:
        raise CheckpointError(f"{layer} is packed, and the configuration says that it is not")
    if not isinstance(stated, Mapping) or any(type(stated.get(key)) is not int for key in ("bits", "group_size")):
        raise CheckpointError(f"{layer} has no whole numbers as bits and group_size in the configuration")
    words, scales, biases = (checkpoint.entries[f"{layer}.{suffix}"] for suffix in ("weight", "scales", "biases"))
    inputs = scales.shape[-1] * stated["group_size"]
    expected = (scales.shape[0], inputs * stated["bits"] // 32)
    if words.dtype != torch.uint32 or tuple(words.shape) != expected or biases.shape != scales.shape:
        raise CheckpointError(f"{layer} has tensors of shapes that {stated['bits']} bits in its groups do not have")
    return stated["bits"], inputs


def read_mlx(checkpoint: Checkpoint, quantization: Mapping[str, Any], layer: str) -> torch.Tensor:
    """float32 [out, in] weight `scales · code + biases` of a packed layer."""
    bits, inputs = _shape(checkpoint, quantization, layer)
    names = {suffix: f"{layer}.{suffix}" for suffix in ("weight", "scales", "biases")}
    tensors = checkpoint.read(names.values())
    words = tensors[names["weight"]].view(torch.int32).numpy()
    scales, biases = (tensors[names[suffix]].float().numpy()[..., None] for suffix in ("scales", "biases"))
    codes = stream_codes(words, bits).astype(np.float32).reshape(*scales.shape[:2], -1)
    return torch.from_numpy((codes * scales + biases).reshape(len(words), inputs))
