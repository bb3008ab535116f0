"""A written folder as its files describe it, and what is wrong with its layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auto_round.inference import checks
from auto_round.modeling.checkpoint import Checkpoint, CheckpointError, read_index
from auto_round.modeling.reading import AGAIN, kind_of, read_json
from auto_round.verify.gptq import read_layer
from auto_round.verify.mlx import is_mlx, mlx_layers, mlx_problem, open_mlx, read_mlx
from auto_round.verify.packed import packed_layers, packed_problem, read_input_scale, read_packed
from auto_round.verify.result import VerificationError

OTHER_METHODS = ("compressed-tensors", "fp8", "mlx")  # whose configurations their own readers check


def stored_as(quantization: Mapping[str, Any], layer: str) -> tuple[int, str]:
    """(bits, packing) of a packed layer by the checkpoint's configuration: AutoRound's, GPTQ's or AWQ's."""
    try:
        found = checks.packed_as(quantization, layer)
    except CheckpointError as error:
        raise VerificationError(str(error)) from error
    return found.bits, found.packing


@dataclass(frozen=True)
class Artifact:
    """A written folder as its files describe it."""

    folder: Path
    checkpoint: Checkpoint
    quantization: dict[str, Any] | None

    @classmethod
    def open(cls, folder: Path) -> Artifact:
        config = read_json(folder / "config.json")
        quantization = config.get("quantization_config")
        if not isinstance(quantization, (dict, type(None))):
            raise CheckpointError(f"{folder / 'config.json'}: quantization_config is {kind_of(quantization)}: {AGAIN}")
        checkpoint = open_mlx(folder, config.get("model_type")) if is_mlx(quantization) else Checkpoint(folder)
        return cls(folder, checkpoint, quantization)

    def packed_layers(self) -> list[str]:
        if is_mlx(self.quantization):
            return mlx_layers(self.checkpoint)
        return packed_layers(self.checkpoint.names())

    def weight(self, layer: str) -> torch.Tensor:
        """float32 [out, in] of a packed layer."""
        if is_mlx(self.quantization):
            return read_mlx(self.checkpoint, self.quantization, layer)
        names = {suffix: f"{layer}.{suffix}" for suffix in ("qweight", "qzeros", "scales")}
        if names["qweight"] not in self.checkpoint:
            return read_packed(self.checkpoint, self.quantization, layer)
        if f"{layer}.g_idx" in self.checkpoint:
            names["g_idx"] = f"{layer}.g_idx"
        tensors = self.checkpoint.read(names.values())
        parts = {suffix: tensors[name] for suffix, name in names.items()}
        return read_layer(parts, *stored_as(self.quantization, layer))

    def input_scale(self, layer: str) -> torch.Tensor | None:
        """float32 [1], the fixed scale of what enters a packed layer; None where there is none."""
        return read_input_scale(self.checkpoint, self.quantization, layer)


def layout_problem(artifact: Artifact) -> str | None:
    """Index, headers and configuration agree, and no layer is stored twice."""
    if is_mlx(artifact.quantization):
        return mlx_problem(artifact.checkpoint, artifact.quantization) or index_problem(artifact)
    if artifact.quantization and (problem := config_problem(artifact.quantization)):
        return problem
    if artifact.quantization and (problem := packed_problem(artifact.checkpoint, artifact.quantization)):
        return problem
    if artifact.packed_layers() and not artifact.quantization:
        return "layers are packed, but config.json has no quantization_config"
    return index_problem(artifact) or integers_problem(artifact)


def index_problem(artifact: Artifact) -> str | None:
    """The index names exactly the tensors that the shards hold."""
    index = artifact.folder / "model.safetensors.index.json"
    if index.exists():
        listed = set(read_index(artifact.folder))
        stray = listed.symmetric_difference(Checkpoint(artifact.folder).names())
        if stray:
            return f"index and shards disagree about {sorted(stray)[0]}"
    return None


def config_problem(quantization: Mapping[str, Any]) -> str | None:
    """A configuration that no loader understands."""
    try:
        if quantization.get("quant_method", checks.METHODS[0]) not in OTHER_METHODS:
            checks.check_config(quantization)
            checks.packing_of(quantization)
    except ValueError as error:
        return str(error)
    return None


def integers_problem(artifact: Artifact) -> str | None:
    """Tensors of packed integers have the shapes and dtypes that the configuration gives them."""
    for layer in artifact.packed_layers():
        if f"{layer}.qweight" in artifact.checkpoint:
            try:
                described = checks.packed_as(artifact.quantization, layer)
            except ValueError as error:
                return str(error)
            problem = checks.packed_problem(artifact.checkpoint.entries, layer, described)
            if problem is not None:
                return problem
    return None
