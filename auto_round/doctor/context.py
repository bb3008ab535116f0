"""What the checks share: the patient, its inputs, and what earlier checks found."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.calibration.native import logits_of, no_cache
from auto_round.doctor.clone import Source
from auto_round.doctor.tiny import text_batch, token_ids
from auto_round.modeling.streaming import StreamedModel
from auto_round.special_model_handler import _handle_special_model, resolve_model_type

GROUP = 32  # group size: both sides of a tiny clone's layers are multiples of it
SAMPLES, LENGTH, BATCH = 8, 32, 4
ITERS = 2  # tuning steps for each block: enough to see gradients flow
MASKED = 1e4  # columns of the logits that a model masks hold the least number of the dtype

Tensors = dict[str, torch.Tensor]


@dataclass
class Context:
    """One examination. Fields are None until the check that finds them has passed.

    Attributes:
        subject: what was given. work: a folder of our own. trust: run the code that the model brings.
        source: its configuration. model: the clone, as Transformers loads it. saved: the clone's folder.
        batch, logits: a text input and what the model makes of it. samples: the calibration set.
        adapted: the clone in memory with its fused modules replaced.
        run: the compressor; plan_error: why there is none.
        stacks: the blocks found, stack by stack.
        unknown: layers in the blocks whose type is not supported. sound: nothing has failed so far.
        out: the quantized folder. loaded: it, as Transformers loads it.
    """

    subject: Any
    work: Path
    scheme: str = "W4A16"
    trust: bool = False
    source: Source | None = None
    model: Any = None
    saved: Path | None = None
    batch: Tensors | None = None
    logits: torch.Tensor | None = None
    samples: list[Any] | None = None
    adapted: StreamedModel | None = None
    run: Any = None
    plan_error: Exception | None = None
    stacks: list[list[str]] | None = None
    unknown: list[str] = field(default_factory=list)
    sound: bool = True
    native: Any = None
    calibrated: bool | None = None
    store: Any = None
    out: Path | None = None
    save_error: Exception | None = None
    loaded: Any = None

    @property
    def model_type(self) -> str:
        if self.model is not None and resolve_model_type(self.model):
            return resolve_model_type(self.model)
        return getattr(self.source.config, "model_type", "") if self.source is not None else ""

    @property
    def class_name(self) -> str:
        return type(self.model).__name__ if self.model is not None else "the model's class"

    @property
    def blocks(self) -> list[str]:
        return [name for stack in self.stacks or () for name in stack]

    def models(self) -> list[nn.Module]:
        """Every form in which the clone is there, to find a module's name in."""
        adapted = [self.adapted.model] if self.adapted is not None else []
        run = [self.run.model] if self.run is not None else []
        return [model for model in (*run, *adapted, self.model) if model is not None]


def find_inputs(model: Any) -> tuple[Tensors, list[Any]]:
    """A batch, and calibration samples, that the model's forward (or the one that stands in for it) takes.

    Raises:
        ValueError: it takes none that we can think of; the message lists what it said.
    """
    if "forward" in model.__dict__:  # a custom forward may take text where the model's own does not
        generator = torch.Generator().manual_seed(1)
        ids = token_ids(model, SAMPLES, LENGTH, generator)
        try:
            logits(model, {"input_ids": ids[:2, :24]})
            return {"input_ids": ids[:2, :24]}, list(ids.split(1))
        except Exception:  # whatever a forward raises on what it cannot take
            pass
    batch, first = text_batch(model, 2, 24, seed=1), text_batch(model, 1, LENGTH)
    if first.keys() <= {"input_ids", "decoder_input_ids"}:
        ids = text_batch(model, SAMPLES, LENGTH)["input_ids"]
        if ids.shape == (SAMPLES, LENGTH):
            return batch, list(ids.split(1))
    return batch, [text_batch(model, 1, LENGTH, seed) for seed in range(SAMPLES)]


@torch.no_grad()
def logits(model: Any, batch: Tensors) -> torch.Tensor:
    """The model's logits in float32, masked columns as zeros; random numbers are the same every time."""
    with torch.random.fork_rng(devices=[]), no_cache(model):
        torch.manual_seed(0)
        found = logits_of(model(**batch)).float()
    return torch.where(found.isfinite() & (found.abs() >= MASKED), 0.0, found)


def adapt(model: Any) -> StreamedModel:
    """A copy of the clone with its fused modules replaced, all weights in memory."""
    held = model.__dict__.pop("forward", None)  # a custom forward is bound to the model that it was made for
    try:
        other = copy.deepcopy(model)
    finally:
        if held is not None:
            model.forward = held
    return StreamedModel(_handle_special_model(other))
