"""A module's weights as a whole: copied, put back, checked, identified."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from auto_round.algorithms.base import relative_name
from auto_round.formats.engines import merged_groups
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import LayerPlan
from auto_round.utils.common import all_finite


def copy_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@torch.no_grad()
def restore_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(weights[name])


def check_finite(module: nn.Module, block: str, layers: Mapping[str, LayerPlan]) -> None:
    """Refuse a block with NaN or Inf in the weights of these layers."""
    for name in layers:
        if not all_finite(module.get_submodule(relative_name(name, block)).weight):
            raise ValueError(
                f"{name}.weight holds NaN or Inf: the checkpoint is damaged; download or convert it again, "
                f"or keep the layer with ignore_layers={name!r}"
            )


def first_bad_tensor(streamed: StreamedModel, blocks: Sequence[str], first: str | None = None) -> str:
    """Why a model gives logits that are not finite: the first weight that is not, if there is one.

    first: the first block whose output is not finite.
    """
    for block in (None, *blocks):  # what lies outside the blocks is there all the time
        with streamed.loaded(block) if block else contextlib.nullcontext(streamed.model) as module:
            for name, parameter in module.named_parameters(prefix=block or ""):
                if parameter.device.type != "meta" and not all_finite(parameter):
                    return f"{name} holds NaN or Inf; the checkpoint is damaged, download or convert it again"
    where = f"from {first} on " if first is not None else ""
    return f"its weights are finite, so {where}its forward overflows in this dtype; try another model_dtype"


def hash_weights(model: nn.Module) -> str:
    """sha256 over all parameters and their names."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_config(model: nn.Module, source_dir: Path | None) -> str:
    """sha256 of what says how the weights are used: config.json where there is one."""
    if source_dir is not None:
        return hashlib.sha256((source_dir / "config.json").read_bytes()).hexdigest()
    return hashlib.sha256(repr(getattr(model, "config", None)).encode()).hexdigest()


def fused_maxima(module: nn.Module, block: str, layers: Mapping[str, LayerPlan]) -> dict[str, float]:
    """Largest magnitude over the layers that engines run as one, for each of NVFP4: they share a scale of the whole."""
    scaled = [name for name, plan in layers.items() if plan.scheme.data_type == "nv_fp"]
    found = {}
    for group in merged_groups(scaled):
        weights = [module.get_submodule(relative_name(name, block)).weight for name in group]
        largest = max(weight.abs().max().item() for weight in weights)
        found.update(dict.fromkeys(group, largest))
    return found
