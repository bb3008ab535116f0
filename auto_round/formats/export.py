"""From the store and the source to a finished folder: every source tensor gets one fate, config.json comes last.

The folder is written beside its final name and renamed when it has been verified and is on the disk, so that nothing
half-written ever stands under the final name, not even after a power cut.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from auto_round.formats.base import ExportFormat, Place
from auto_round.formats.parts import changed_groups, pieces, read_pieces, refused_layers, stem_of
from auto_round.formats.writer import CheckpointWriter, copy_side_files, write_config
from auto_round.modeling.streaming import StreamedModel, TensorShape
from auto_round.plan import LayerInfo, LayerPlan, ModelPlan, PlanError
from auto_round.store import Store
from auto_round.utils.common import all_finite
from auto_round.utils.device import trim_memory
from auto_round.utils.files import Lock, make_folder, sync, sync_tree

LARGE = 1_000_000  # elements above which a tensor left in high precision is listed with its reason


class LedgerError(RuntimeError):
    """A source tensor without a fate, or with two."""


@dataclass
class Ledger:
    """What became of every source tensor: quantized, kept, tied, transformed or dropped, and why.

    not_finite: tensors that were kept although they hold NaN or Inf.
    """

    fates: dict[str, tuple[str, str]] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)

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


def make_ledger(
    streamed: StreamedModel, plan: ModelPlan, plain: bool = False, replaced: Collection[str] = ()
) -> Ledger:
    """Decide every source tensor's fate from the plan, before anything is written.

    plain: the result is an ordinary checkpoint, whose experts stay fused.
    replaced: names that the run has tensors of its own for.
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
        elif name in replaced:
            ledger.add(name, "dropped", "calibration found another")
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
        if not (group.fused and fmt.plain):
            stems = [written.removesuffix(".weight") for written in group.written.values()]
            shapes += [part for stem in stems if stem in layers for part in _packed_shapes(stem, layers, fmt)]
    shapes += [(written, piece.shape) for written, piece in pieces(streamed, plan, fmt.plain).items()]
    return _gathered(shapes, Places(streamed, plan, fmt))


class Places:
    """Where a format writes tensors, by the names that they would have without it."""

    def __init__(self, streamed: StreamedModel, plan: ModelPlan, fmt: ExportFormat):
        self.infos: dict[str, LayerInfo] = {stem_of(streamed, name): layer.info for name, layer in plan.layers.items()}
        self.fmt = fmt

    def __getitem__(self, name: str) -> Place:
        stem, _, suffix = name.rpartition(".")
        found = self.fmt.place(self.infos[stem], suffix) if stem in self.infos else None
        return found or Place(name)


def _gathered(shapes: Iterable[tuple[str, TensorShape]], places: Places) -> list[tuple[str, TensorShape]]:
    """What is written: tensors that several layers have a slice of stand where the first of them stood."""
    found: list[tuple[str, TensorShape]] = []
    stacks: set[str] = set()
    for name, shape in shapes:
        place = places[name]
        if place.name not in stacks:
            found.append((place.name, place.shape(shape)))
        if place.index is not None:
            stacks.add(place.name)
    return found


def _packed_shapes(stem: str, layers: Mapping[str, LayerPlan], fmt: ExportFormat) -> list[tuple[str, TensorShape]]:
    return [(f"{stem}.{suffix}", part) for suffix, part in fmt.layout(layers[stem]).items()]


def check_attention(fmt: ExportFormat, asked: Mapping[str, str]) -> None:
    """Refuse a format without a place for attention's scales, where they are asked for.

    Raises:
        PlanError: the format cannot hold them.
    """
    if asked and fmt.pack_attention is None:
        raise PlanError(
            f"{fmt.name} has no place for the scales that {next(iter(asked))} asks for: use llm_compressor or "
            "auto_round, or leave the option out"
        )


def stored_attention(
    streamed: StreamedModel, plan: ModelPlan, store: Store, fmt: ExportFormat
) -> dict[str, torch.Tensor]:
    """Attention's scales, as a format stores them, by the name under which they are stored."""
    per_head = "head" in store.facts.get("attention", {}).values()
    found = {}
    for block in plan.block_names:
        for parameter, scale in store.beside(block).items():
            module, _, suffix = parameter.rpartition(".")
            inside = next(name for name, _ in streamed.model.get_submodule(module).named_parameters())
            stored = streamed.source_name(f"{module}.{inside}")
            stem = stored.removesuffix(f".{inside}") if stored.endswith(f".{inside}") else module
            found[f"{stem}.{suffix}"] = fmt.pack_attention(scale, per_head)
    return found


def planned_bytes(streamed: StreamedModel, plan: ModelPlan, fmt: ExportFormat) -> int:
    """Bytes of the weights that will be written, known before any work."""
    shapes = tensor_shapes(streamed, plan, fmt, make_ledger(streamed, plan, fmt.plain))
    return sum(torch.Size(shape.shape).numel() * shape.dtype.itemsize for _, shape in shapes)


def write_folder(
    folder: Path,
    streamed: StreamedModel,
    plan: ModelPlan,
    store: Store,
    *,
    fmt: ExportFormat,
    source_dir: Path | None,
    tokenizer: Any = None,
    settings: Mapping[str, Any],
    max_shard_size: int | str = "5GB",
) -> Ledger:
    """Write a complete model folder in `fmt`.

    Raises:
        OSError: too little disk space, before anything is written. LedgerError: a tensor would be lost.
    """
    scales = stored_attention(streamed, plan, store, fmt)
    ledger = make_ledger(streamed, plan, fmt.plain, scales)
    refused = refused_layers(streamed, plan) if fmt.plain else {}
    shapes = tensor_shapes(streamed, plan, fmt, ledger)
    shapes += [(name, TensorShape(tuple(scale.shape), scale.dtype)) for name, scale in scales.items()]
    places = Places(streamed, plan, fmt)
    with CheckpointWriter(folder, shapes, max_shard_size or "5GB") as writer:

        def write(name: str, value: torch.Tensor) -> None:
            writer.write(places[name].name, value, places[name].index)

        for name, scale in scales.items():
            write(name, scale)
        for name in ledger.of("kept"):
            value = streamed.read_source(name)
            if not all_finite(value):
                ledger.not_finite.append(name)
            write(name, value)
        for name, value in read_pieces(streamed, plan, store, fmt.plain):
            write(name, value)
        for part in plan.parts:
            for name, tensor in store.load(part, plan.quantized(part)).tensors.items():
                if name in refused:
                    continue
                for suffix, packed in fmt.pack(tensor, plan.layers[name].info).items():
                    write(f"{stem_of(streamed, name)}.{suffix}", packed)
            trim_memory()
    _write_side_files(folder, streamed, source_dir, tokenizer)
    config = _source_config(streamed, source_dir)
    write_config(fmt.adapt_config(config), fmt.config(settings), folder)
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


@contextlib.contextmanager
def unfinished(final: Path) -> Iterator[Path]:
    """The folder in which `final` is written, for this process alone; it is removed if anything goes wrong.

    Raises:
        InUseError: another process writes the same folder. OSError: the rest of an earlier run cannot be removed.
    """
    make_folder(final.parent)
    with contextlib.closing(Lock(_beside(final, "lock"), str(final))):
        recover(final)
        partial = _beside(final, "partial")
        if partial.exists() or partial.is_symlink():
            shutil.rmtree(partial)
        try:
            yield partial
        except BaseException:  # an interrupt, too: what is left would look like a model
            shutil.rmtree(partial, ignore_errors=True)
            raise


def recover(final: Path) -> None:
    """Settle a replacement that was begun: the older folder goes if the new one is there, else it comes back."""
    old = _beside(final, "replaced")
    if old.exists():
        if not final.exists():
            old.rename(final)
        sync(final.parent)  # before the older folder goes, or a power cut could take both
        shutil.rmtree(old, ignore_errors=True)


def publish(partial: Path, final: Path) -> None:
    """Give a verified folder its final name; an older one of that name goes when the new one is safely there."""
    sync_tree(partial)
    try:
        if final.exists():
            final.rename(_beside(final, "replaced"))
        partial.rename(final)
    finally:
        recover(final)
    sync(final.parent)


def _beside(final: Path, kind: str) -> Path:
    return final.with_name(f"{final.name}.{kind}")
