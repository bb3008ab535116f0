"""From the store to a finished folder: write, verify, report, and only then the final name."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from auto_round.calibration.coverage import coverage
from auto_round.calibration.feed import sample_length, vocabulary_size
from auto_round.compressors.experts import expert_coverage
from auto_round.compressors.verifying import verify
from auto_round.formats.base import ExportFormat
from auto_round.formats.export import (
    Ledger,
    check_attention,
    large_kept,
    publish,
    unfinished,
    write_folder,
)
from auto_round.formats.writer import unreadable_side_file, write_json
from auto_round.logger import logger
from auto_round.plan import ModelPlan
from auto_round.report import render_html
from auto_round.schemes import QuantizationScheme
from auto_round.store import Store
from auto_round.utils.device import device_peak_mb, peak_memory_mb
from auto_round.utils.environment import environment, repeated
from auto_round.utils.files import make_folder
from auto_round.utils.model import auto_class_name
from auto_round.verify.result import Verification
from auto_round.verify.values import file_hashes

if TYPE_CHECKING:
    from auto_round.compressors.base import Compressor

PACKAGES = ("auto-round", "torch", "transformers", "safetensors", "tokenizers", "accelerate", "numpy")
LONGEST_FILE = 120  # characters of the longest file name in a work folder


def folder_name(model: str, scheme: QuantizationScheme, gguf: bool = False, label: str | None = None) -> str:
    """`name-w4g128`: model, number family unless it is plain integers, width and groups; `name-gguf`; `name-label`.

    Without a positive group size, the width of activations stands for it: `name-w8a8`, `name-fp-w8afp8`.
    """
    if gguf or label is not None:
        return f"{model}-{label or 'gguf'}"
    family = "" if scheme.data_type == "int" else f"-{scheme.data_type.replace('_', '')}"
    size = scheme.group_size
    if isinstance(size, tuple):
        suffix = f"g{size[0]}x{size[1]}"
    elif size > 0:
        suffix = f"g{size}"
    else:
        act = scheme.act_data_type or ("" if scheme.data_type == "int" else scheme.data_type)
        suffix = f"a{'fp' if 'fp' in act else ''}{scheme.act_bits or 16}"
    return f"{model}{family}-w{scheme.bits}{suffix}"


def format_folders(base: Path, formats: Sequence[ExportFormat]) -> list[Path]:
    """Where each format goes: to the folder itself if there is one format, else below it."""
    if len(formats) == 1:
        return [base]
    return [base / fmt.name.replace(":", "-").replace("_", "-") for fmt in formats]


def prepare_output(final: Path, source: Path | None = None) -> None:
    """Make sure that the output can be written and destroys nothing, before any work.

    Raises:
        OSError: the folder cannot be made or written, lies in the source model's, or holds what is not ours; or a
            file of the source that is to be carried over cannot be read. InUseError: another run writes it now.
    """
    parent = final.parent
    if source is not None and source.resolve() in (final.resolve(), *final.resolve().parents):
        raise OSError(f"the output folder {final} lies in the model's own folder {source}: choose another")
    broken = unreadable_side_file(source, final) if source is not None else None
    if broken is not None:
        raise OSError(f"{broken}, which belongs to the model, cannot be read: download it again, or remove it")
    probe = parent / f"{final.name}.probe-{os.getpid()}"  # as long as the longest name beside the output
    try:
        make_folder(parent)
        (probe / ("x" * LONGEST_FILE)).mkdir(parents=True)
    except OSError as error:
        raise OSError(f"the output folder {parent} cannot be written ({error.strerror}): choose another") from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    with unfinished(final):  # what a killed run has left goes, and what it was replacing comes back
        pass
    empty = not final.exists() or (final.is_dir() and not any(final.iterdir()))
    if not empty and {path.parent for path in final.glob("**/report.json")} != {final}:
        raise OSError(
            f"{final} is there already and is no result of one run, so it is not replaced: move it away, or choose "
            "another output folder"
        )


def save(
    run: Compressor,
    store: Store,
    fmt: ExportFormat,
    final: Path,
    max_shard_size: int | str | None = None,
    command: str | None = None,
) -> Path:
    """Write `final` in `fmt` and verify it. On failure nothing new stands beside or under that name.

    command: what repeats the run, for the report.

    Raises:
        VerificationError: what was written is not what was quantized. InUseError: another run writes `final`.
    """
    check_attention(fmt, store.facts.get("attention", {}))
    with unfinished(final) as partial:
        began = time.monotonic()
        ledger = _write(run, store, fmt, partial, max_shard_size)
        run.times["export"] = time.monotonic() - began
        began = time.monotonic()
        checks = verify(run, store, ledger, partial, fmt)
        run.times["verify"] = time.monotonic() - began
        checks.raise_if_failed(final)
        run.report = make_report(run, fmt, final, partial, ledger, checks) | {"command": command or repeated()}
        write_json(partial / "report.json", run.report)
        (partial / "report.html").write_text(render_html(run.report), encoding="utf-8")
        publish(partial, final)
    logger.info("saved %s (KL %.5f from the original)", final, checks.kl if checks.kl is not None else float("nan"))
    return final


def _write(run: Compressor, store: Store, fmt: ExportFormat, partial: Path, max_shard_size: int | str | None) -> Ledger:
    write = fmt.write_folder or functools.partial(write_folder, fmt=fmt)
    ledger = write(
        partial,
        run.streamed,
        fmt.plan,
        store,
        source_dir=run.source_dir,
        tokenizer=run.tokenizer,
        settings={**_recorded(run), **store.facts.get("attention", {})},
        max_shard_size=max_shard_size or "5GB",
    )
    if fmt.plain and any(layer.scheme.act for layer in run.plan.quantized().values()):
        run.warnings.append(f"{fmt.name} holds weights only: whoever loads it does not quantize activations")
    if run.plan.drafts and not fmt.plan.drafts:
        names = ", ".join(run.plan.drafts[:3])
        run.warnings.append(f"{fmt.name} leaves layers for multi-token prediction as they are ({names})")
    if ledger.not_finite:
        first, more = ledger.not_finite[0], len(ledger.not_finite) - 1
        run.warnings.append(
            f"{first}{f' and {more} more' if more else ''} of the source hold NaN or Inf and were kept as they are: "
            "the checkpoint may be damaged"
        )
    return ledger


def _recorded(run: Compressor) -> dict[str, Any]:
    """Settings that the checkpoint's configuration carries."""
    settings = {"iters": run.tune.iters, "seed": run.tune.seed}
    if run.needs_data:
        settings |= {"nsamples": run.calibration.nsamples, "seqlen": run.calibration.seqlen}
    return settings


def make_report(
    run: Compressor, fmt: ExportFormat, final: Path, partial: Path, ledger: Ledger, checks: Verification
) -> dict[str, Any]:
    """Everything that a person may want to know of the run, as plain values."""
    in_blocks = [plan for plan in fmt.plan.layers.values() if plan.info.block is not None or plan.is_quantized]
    done = sum(plan.is_quantized for plan in in_blocks)
    source = sum(torch.Size(s.shape).numel() * s.dtype.itemsize for s in run.streamed.source_tensors().values())
    large = large_kept(ledger, run.streamed)
    return {
        "model": str(run.source_dir or run.name),
        "auto_class": auto_class_name(run.model.config) if hasattr(run.model, "config") else "AutoModelForCausalLM",
        "scheme": run.scheme.to_dict(),
        "auto_scheme": {**run.choice.describe(), "measured_kl": checks.kl} if run.choice is not None else None,
        "format": fmt.name,
        "folder": str(final),
        "work_folder": str(run.store.folder),
        "quantized_layers": [done, len(in_blocks)],
        "layers": layer_list(fmt.plan),
        "large_kept": large,
        "blocks": run.block_log,
        "data": _data(run),
        "checks": [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in checks.checks],
        "kl": checks.kl,
        "top1": checks.top1,
        "ledger": ledger.counts(),
        "sizes": {"source_bytes": source, "output_bytes": _weight_bytes(partial)},
        "times": {name: round(seconds, 3) for name, seconds in run.times.items()},
        "peak_memory_mb": round(peak_memory_mb()),
        "import_memory_mb": round(run.import_memory_mb),
        "device_peak_mb": device_peak_mb(run.device),
        "tuning_rate": run.tuning_rate,
        "scales": {"losses": run.scale_log} if run.scale_log else None,
        "working": dataclasses.asdict(run.working),
        "minutes": run.pick.describe() if run.pick is not None else None,
        "estimate": run.estimate.to_dict() if run.estimate is not None else None,
        "source": run.store.facts["source"],
        "settings": run.store.facts["settings"],
        "versions": {name: version(name) for name in PACKAGES},
        "machine": environment(run.device),
        "warnings": run.warnings,
        "files": file_hashes(partial),
    }


def layer_list(plan: ModelPlan) -> list[dict[str, Any]]:
    """What becomes of every layer and why, as plain values."""
    return [
        {
            "name": layer.name,
            "bits": layer.scheme.bits,
            "data_type": layer.scheme.data_type,
            "act_bits": layer.scheme.act_bits,
            "group_size": layer.scheme.group_size,
            "sym": layer.scheme.sym,
            "status": "quantized" if layer.is_quantized else "kept",
            "reason": layer.reason,
            "numel": layer.info.numel,
        }
        for layer in plan.layers.values()
    ]


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for kind in ("safetensors", "gguf") for file in folder.glob(f"*.{kind}"))


def _data(run: Compressor) -> dict[str, Any] | None:
    if run.data is None or not run.needs_data:
        return None
    data = run.data
    return {
        "source": data.source,
        "samples": len(data.samples),
        "tokens": data.tokens,
        "seqlen": max(sample_length(sample) for sample in data.samples),
        "sha256": data.sha256,
        **coverage(data, run.tokenizer, vocabulary_size(run.model)),
        "tokens_of_experts": expert_coverage(run.block_log),
        "notes": list(data.notes),
    }
