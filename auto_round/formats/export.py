"""From the store and the source to a finished folder: every source tensor gets one fate, config.json comes last.

The folder is written beside its final name and renamed when it has been verified, so that nothing half-written ever
stands under the final name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from auto_round.formats.base import ExportFormat
from auto_round.formats.parts import changed_groups, pieces, read_pieces, refused_layers, stem_of
from auto_round.formats.writer import CheckpointWriter, copy_side_files, write_config
from auto_round.modeling.streaming import StreamedModel, TensorShape
from auto_round.plan import LayerPlan, ModelPlan
from auto_round.store import Store
from auto_round.utils.device import trim_memory

LARGE = 1_000_000  # elements above which a tensor left in high precision is listed with its reason


class LedgerError(RuntimeError):
    """A source tensor without a fate, or with two."""


@dataclass
class Ledger:
    """What became of every source tensor: quantized, kept, tied, transformed or dropped, and why."""

    fates: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, name: str, fate: str, reason: str) -> None:
        if name in self.fates:
            raise LedgerError(f"source tensor {name!r} was written twice: as {self.fates[name]} and as {fate}")
        self.fates[name] = (fate, reason)

    def close(self, names: Any) -> None:
        """Every source tensor must have its fate."""
        lost = [name for name in names if name not in self.fates]
        if lost:
            raise LedgerError(f"source tensor {lost[0]!r} (and {len(lost) - 1} more) would be lost")

    def counts(self) -> dict[str, int]:
        totals = dict.fromkeys(("quantized", "kept", "tied", "transformed", "dropped"), 0)
        for fate, _ in self.fates.values():
            totals[fate] += 1
        return totals

    def of(self, fate: str) -> list[str]:
        return [name for name, (found, _) in self.fates.items() if found == fate]


def make_ledger(streamed: StreamedModel, plan: ModelPlan, plain: bool = False) -> Ledger:
    """Decide every source tensor's fate from the plan, before anything is written.

    plain: the result is an ordinary checkpoint, whose experts stay fused.
    """
    ledger = Ledger()
    quantized = {f"{stem_of(streamed, name)}.weight": layer for name, layer in plan.quantized().items()}
    reasons = {f"{stem_of(streamed, name)}.weight": layer.reason for name, layer in plan.kept().items()}
    regrouped = {key: group for group in changed_groups(streamed, plan) for key in group.sources}
    unused = set(streamed.names.unused)
    source = streamed.source_tensors()
    for name in source:
        if name in quantized:
            layer = quantized[name]
            ledger.add(name, "quantized", f"{layer.scheme.bits} bits; {layer.reason}")
        elif name in regrouped:
            what = "quantized as a whole" if plain else f"became {len(regrouped[name].written)} tensors"
            ledger.add(name, "transformed", what)
        elif name in unused:
            ledger.add(name, "kept", "Transformers does not instantiate it")
        else:
            ledger.add(name, "kept", reasons.get(name, "no layer that is quantized"))
    ledger.close(source)
    for name, reason in getattr(streamed.checkpoint, "dropped", {}).items():
        if name not in ledger.fates:  # codes keep the name under which their floats are shown
            ledger.add(name, "dropped", reason)
    return ledger


def large_kept(ledger: Ledger, streamed: StreamedModel) -> list[dict[str, Any]]:
    """Tensors of more than a million elements that stay in high precision, with the reason."""
    found = []
    for name, shape in streamed.source_tensors().items():
        fate, reason = ledger.fates[name]
        numel = torch.Size(shape.shape).numel()
        if fate == "kept" and numel > LARGE:
            found.append({"name": name, "numel": numel, "reason": reason})
    return found


def tensor_shapes(
    streamed: StreamedModel, plan: ModelPlan, fmt: ExportFormat, ledger: Ledger
) -> list[tuple[str, TensorShape]]:
    """Name, shape and dtype of every tensor that will be written, in the source's order."""
    layers = {stem_of(streamed, name): layer for name, layer in plan.quantized().items()}
    shapes: list[tuple[str, TensorShape]] = []
    for name, shape in streamed.source_tensors().items():
        fate = ledger.fates[name][0]
        if fate == "quantized":
            shapes += _packed_shapes(name.removesuffix(".weight"), layers, fmt)
        elif fate == "kept":
            shapes.append((name, shape))
    for group in changed_groups(streamed, plan):
        if not (group.fused and is_plain(fmt)):
            stems = [written.removesuffix(".weight") for written in group.written.values()]
            shapes += [part for stem in stems if stem in layers for part in _packed_shapes(stem, layers, fmt)]
    shapes += [(written, piece.shape) for written, piece in pieces(streamed, plan, is_plain(fmt)).items()]
    return shapes


def _packed_shapes(stem: str, layers: Mapping[str, LayerPlan], fmt: ExportFormat) -> list[tuple[str, TensorShape]]:
    return [(f"{stem}.{suffix}", part) for suffix, part in fmt.layout(layers[stem]).items()]


def is_plain(fmt: ExportFormat) -> bool:
    """Whether a format's result is an ordinary checkpoint, read without our classes."""
    return getattr(fmt, "plain", False)


def planned_bytes(streamed: StreamedModel, plan: ModelPlan, fmt: ExportFormat) -> int:
    """Bytes of the weights that will be written, known before any work."""
    shapes = tensor_shapes(streamed, plan, fmt, make_ledger(streamed, plan, is_plain(fmt)))
    return sum(torch.Size(shape.shape).numel() * shape.dtype.itemsize for _, shape in shapes)


def write_folder(
    folder: Path,
    streamed: StreamedModel,
    plan: ModelPlan,
    store: Store,
    fmt: ExportFormat,
    *,
    source_dir: Path | None,
    tokenizer: Any = None,
    settings: Mapping[str, Any],
    max_shard_size: int | str = "5GB",
) -> Ledger:
    """Write a complete model folder in `fmt`.

    Raises:
        OSError: too little disk space, before anything is written. LedgerError: a tensor would be lost.
    """
    ledger = make_ledger(streamed, plan, is_plain(fmt))
    refused = refused_layers(streamed, plan) if is_plain(fmt) else {}
    with CheckpointWriter(folder, tensor_shapes(streamed, plan, fmt, ledger), max_shard_size or "5GB") as writer:
        for name in ledger.of("kept"):
            writer.write(name, streamed.read_source(name))
        for name, value in read_pieces(streamed, plan, store, is_plain(fmt)):
            writer.write(name, value)
        for part in plan.parts:
            for name, tensor in store.load(part, plan.quantized(part)).tensors.items():
                if name in refused:
                    continue
                for suffix, packed in fmt.pack(tensor, plan.layers[name].info).items():
                    writer.write(f"{stem_of(streamed, name)}.{suffix}", packed)
            trim_memory()
    _write_side_files(folder, streamed, source_dir, tokenizer)
    write_config(_source_config(streamed, source_dir), fmt.config(settings), folder)
    return ledger


def _write_side_files(folder: Path, streamed: StreamedModel, source_dir: Path | None, tokenizer: Any) -> None:
    if source_dir is not None:
        copy_side_files(source_dir, folder)
        return
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    generation = getattr(streamed.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def _source_config(streamed: StreamedModel, source_dir: Path | None) -> dict[str, Any]:
    if source_dir is not None:
        return json.loads((source_dir / "config.json").read_text(encoding="utf-8"))
    config = json.loads(streamed.model.config.to_json_string(use_diff=True))
    config.setdefault("architectures", [type(streamed.model).__name__])
    return config


def publish(partial: Path, final: Path) -> None:
    """Give a verified folder its final name; an older one of that name is replaced."""
    old = final.with_name(final.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    if old.exists():
        shutil.rmtree(old)
