"""What structure cannot tell about a model: the tables of exceptions, honoured before discovery.

Extension points, each one entry and one test:

- `SPECIAL_MULTIMODAL_BLOCK[model_type] = handler(model, quant_vision) -> [[block names], …]` where blocks are not
  found from the module graph;
- a branch in `_handle_special_model` where `model.forward` cannot be driven with the calibration batch;

The other three tables hold the names that models are registered under by convention. Nothing consults them yet: shared
arguments are found by value, and whether samples can be joined by how the arguments grow with the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

BlockHandler = Callable[[nn.Module, bool], list[list[str]]]

# model_type -> handler that lists the blocks, stack by stack.
SPECIAL_MULTIMODAL_BLOCK: dict[str, BlockHandler] = {}

# model_types whose text part may be calibrated with text alone.
SUPPORT_ONLY_TEXT_MODELS: list[str] = []

# model_types (or parts of them) whose samples cannot be put in one batch.
mllms_with_limited_bs: tuple[str, ...] = ()

# class name of the model -> arguments that all samples share.
SPECIAL_SHARED_CACHE_KEYS: dict[str, tuple[str, ...]] = {}


@dataclass(frozen=True)
class ModelTraits:
    """What the tables that are consulted say of one model."""

    model_type: str
    block_handler: BlockHandler | None


def resolve_model_type(model: nn.Module) -> str:
    """`config.model_type`, or an empty string for a module without a configuration."""
    return getattr(getattr(model, "config", None), "model_type", None) or ""


def model_traits(model: nn.Module) -> ModelTraits:
    """Look the model up in the tables, once."""
    model_type = resolve_model_type(model)
    return ModelTraits(
        model_type=model_type,
        block_handler=SPECIAL_MULTIMODAL_BLOCK.get(model_type),
    )


def _handle_special_model(model: nn.Module) -> nn.Module:
    """Give a model whose own forward cannot be driven by text batches one that can; others pass unchanged."""
    return model
