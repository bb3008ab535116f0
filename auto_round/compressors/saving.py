"""From the store to a finished folder: write, verify, report, and only then the final name."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from auto_round.calibration.feed import sample_length
from auto_round.calibration.native import no_cache, run_logits
from auto_round.formats.base import ExportFormat
from auto_round.formats.export import Ledger, is_plain, large_kept, publish, write_folder
from auto_round.formats.parts import pieces, read_pieces, refused_layers, stem_of
from auto_round.formats.writer import write_json
from auto_round.logger import logger
from auto_round.report import render_html
from auto_round.schemes import QuantizationScheme
from auto_round.store import Store
from auto_round.utils.device import device_peak_mb, peak_memory_mb
from auto_round.utils.model import auto_class_name, load_model
from auto_round.verify import (
    RELOAD_LIMIT,
    Artifact,
    Verification,
    artifact_logits,
    codes_problem,
    file_hashes,
    kept_problem,
    layout_problem,
    logit_distance,
    pieces_problem,
    reload_problem,
)
from auto_round.verify_packed import reader_missing

if TYPE_CHECKING:
    from auto_round.compressors.base import Compressor


def folder_name(model: str, scheme: QuantizationScheme) -> str:
    """`name-w4g128`: model, width and group size; without a positive group size, the activations' width."""
    suffix = f"g{scheme.group_size}" if scheme.group_size > 0 else f"a{scheme.act_bits or 16}"
    return f"{model}-w{scheme.bits}{suffix}"


def prepare_output(folder: Path, nbytes: int = 0) -> None:
    """Make sure that the output can be written, before any work.

    Raises:
        OSError: the folder cannot be made or written, or its disk has less than `nbytes` free.
    """
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        probe = parent / f".write-test-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise OSError(f"the output folder {parent} cannot be written ({error.strerror}): choose another") from error
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise OSError(
            f"{parent} has {free / 1e9:.1f} GB free, and the result with its work folder needs {nbytes / 1e9:.1f} GB: "
            "make room or choose another output folder"
        )


def save(
    run: Compressor, store: Store, fmt: ExportFormat, final: Path, max_shard_size: int | str | None = None
) -> Path:
    """Write `final` in `fmt` and verify it. On failure nothing stands under that name.

    Raises:
        VerificationError: what was written is not what was quantized.
    """
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    began = time.monotonic()
    settings = _recorded(run)
    try:
        ledger = write_folder(
            partial,
            run.streamed,
            run.plan,
            store,
            fmt,
            source_dir=run.source_dir,
            tokenizer=run.tokenizer,
            settings=settings,
            max_shard_size=max_shard_size or "5GB",
        )
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk is no place to leave half a model
        raise
    run.times["export"] = time.monotonic() - began
    began = time.monotonic()
    checks = verify(run, store, ledger, partial, is_plain(fmt))
    run.times["verify"] = time.monotonic() - began
    checks.raise_if_failed(partial)
    run.report = make_report(run, fmt, final, partial, ledger, checks)
    write_json(partial / "report.json", run.report)
    (partial / "report.html").write_text(render_html(run.report), encoding="utf-8")
    publish(partial, final)
    logger.info("saved %s (KL %.5f from the original)", final, checks.kl if checks.kl is not None else float("nan"))
    return final


def _recorded(run: Compressor) -> dict[str, Any]:
    """Settings that the checkpoint's configuration carries."""
    settings = {"iters": run.tune.iters, "seed": run.tune.seed}
    if run.tune.needs_data:
        settings |= {"nsamples": run.calibration.nsamples, "seqlen": run.calibration.seqlen}
    return settings


def verify(run: Compressor, store: Store, ledger: Ledger, folder: Path, plain: bool = False) -> Verification:
    """All checks on a written folder that the run's own knowledge allows. plain: it is an ordinary checkpoint."""
    result = Verification()
    artifact = Artifact.open(folder)
    stems = {name: stem_of(run.streamed, name) for name in run.plan.quantized()}
    refused = refused_layers(run.streamed, run.plan) if plain else {}
    result.add("ledger", None, ", ".join(f"{n} {fate}" for fate, n in ledger.counts().items() if n))
    result.add("layout", layout_problem(artifact), "index, headers and configuration agree")
    result.add(
        "reloaded = quantized",
        next(filter(None, (codes_problem(artifact, run.plan, store, stems, p, refused) for p in run.plan.parts)), None),
        f"{len(stems)} layers read back bit for bit",
    )
    kept = ledger.of("kept")
    result.add("kept = source", kept_problem(artifact, run.streamed, kept), f"{len(kept)} tensors byte for byte")
    loose = pieces(run.streamed, run.plan, plain)
    if loose:
        problem = pieces_problem(artifact, read_pieces(run.streamed, run.plan, store, plain))
        result.add("parts = source", problem, f"{len(loose)} parts of fused tensors")
    native = run.observe_original()
    result.add("replay = model", None, f"{len(native.blocks)} blocks, each run again on the same arguments")
    if run.streamed.replaced:
        detail = f"{len(run.streamed.replaced)} modules, at most {native.replacement_error:.1e} apart"
        result.add("unfused = fused", None, detail)
    _verify_logits(run, store, result, artifact)
    return result


def _verify_logits(run: Compressor, store: Store, result: Verification, artifact: Artifact) -> None:
    native = run.observe_original()
    if run.streamed.is_streamed:
        logits = artifact_logits(run.streamed, run.plan, store, native.batch, run.amp)
        finite = bool(torch.isfinite(logits).all())
        result.add("finite", None if finite else "the quantized model gives logits that are not finite", "logits")
        result.kl, result.top1 = logit_distance(native.logits, logits)
    if artifact.checkpoint.nbytes > RELOAD_LIMIT:
        size, limit = artifact.checkpoint.nbytes >> 20, RELOAD_LIMIT >> 20
        run.warnings.append(f"Transformers was not made to load the result: {size} MiB, the check stops at {limit} MiB")
        return
    missing = reader_missing(artifact.quantization)
    if missing is not None:
        logger.warning(missing)
        run.warnings.append(missing)
        return
    if not run.streamed.is_streamed:
        logits, result.kl, result.top1 = _reloaded_logits(run, artifact, native)
        finite = bool(torch.isfinite(logits).all())
        result.add("loads in Transformers", None if finite else "its logits are not finite", "logits are finite")
        return
    # Transformers computes in the dtype that is stored: so do we, or rounding sends tokens to other experts.
    logits = artifact_logits(run.streamed, run.plan, store, native.batch, contextlib.nullcontext)
    problem = reload_problem(artifact.folder, native.batch, logits, run.trust_remote_code, _is_routed(run))
    result.add("loads in Transformers", problem, "logits of the reloaded model are the quantized model's")


def _is_routed(run: Compressor) -> bool:
    """Whether the model has experts among which tokens choose."""
    routers = any(plan.info.role == "router" for plan in run.plan.layers.values())
    return routers or bool(run.streamed.replaced) or any(why.startswith("router") for why in run.plan.beside.values())


def _reloaded_logits(run: Compressor, artifact: Artifact, native) -> tuple[torch.Tensor, float, float]:
    """A model that came as an object is compared through the reloaded artifact: its own weights are not touched."""
    model = load_model(artifact.folder, run.trust_remote_code)
    with no_cache(model):
        logits = run_logits(model, native.batch, "cpu")
    return logits, *logit_distance(native.logits, logits)


def make_report(
    run: Compressor, fmt: ExportFormat, final: Path, partial: Path, ledger: Ledger, checks: Verification
) -> dict[str, Any]:
    """Everything that a person may want to know of the run, as plain values."""
    in_blocks = [plan for plan in run.plan.layers.values() if plan.info.block is not None or plan.is_quantized]
    done = sum(plan.is_quantized for plan in in_blocks)
    source = sum(torch.Size(s.shape).numel() * s.dtype.itemsize for s in run.streamed.source_tensors().values())
    large = large_kept(ledger, run.streamed)
    return {
        "model": str(run.source_dir or run.name),
        "auto_class": auto_class_name(run.model.config) if hasattr(run.model, "config") else "AutoModelForCausalLM",
        "scheme": run.scheme.to_dict(),
        "format": fmt.name,
        "folder": str(final),
        "work_folder": str(run._store.folder),
        "quantized_layers": [done, len(in_blocks)],
        "layers": [
            {
                "name": plan.name,
                "bits": plan.scheme.bits,
                "group_size": plan.scheme.group_size,
                "sym": plan.scheme.sym,
                "status": "quantized" if plan.is_quantized else "kept",
                "reason": plan.reason,
                "numel": plan.info.numel,
            }
            for plan in run.plan.layers.values()
        ],
        "large_kept": large,
        "blocks": run.block_log,
        "data": _data(run),
        "checks": [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in checks.checks],
        "kl": checks.kl,
        "top1": checks.top1,
        "ledger": ledger.counts(),
        "sizes": {"source_bytes": source, "output_bytes": Artifact.open(partial).checkpoint.nbytes},
        "times": {name: round(seconds, 3) for name, seconds in run.times.items()},
        "peak_memory_mb": round(peak_memory_mb()),
        "import_memory_mb": round(run.import_memory_mb),
        "device_peak_mb": device_peak_mb(run.device),
        "settings": run.facts()["settings"],
        "versions": {name: version(name) for name in ("auto-round", "torch", "transformers", "safetensors")},
        "command": " ".join(sys.argv),
        "warnings": run.warnings,
        "files": file_hashes(partial),
    }


def _data(run: Compressor) -> dict[str, Any] | None:
    if run.data is None or not run.tune.needs_data:
        return None
    data = run.data
    return {
        "source": data.source,
        "samples": len(data.samples),
        "tokens": data.tokens,
        "seqlen": max(sample_length(sample) for sample in data.samples),
        "sha256": data.sha256,
        "notes": list(data.notes),
    }
