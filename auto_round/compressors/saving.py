"""From the store to a finished folder: write, verify, report, and only then the final name."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from auto_round.calibration.attention import rounded_cache
from auto_round.calibration.feed import sample_length
from auto_round.calibration.native import no_cache, run_logits
from auto_round.formats.base import ExportFormat
from auto_round.formats.export import (
    Ledger,
    check_attention,
    large_kept,
    publish,
    stored_attention,
    write_folder,
)
from auto_round.formats.parts import pieces, read_pieces, refused_layers, stem_of
from auto_round.formats.writer import write_json
from auto_round.inference.load import load_model
from auto_round.logger import logger
from auto_round.plan import ModelPlan
from auto_round.report import render_html
from auto_round.schemes import QuantizationScheme
from auto_round.store import Store
from auto_round.utils.device import device_peak_mb, peak_memory_mb
from auto_round.utils.model import auto_class_name
from auto_round.verify.artifact import Artifact, layout_problem
from auto_round.verify.gguf import gguf_file, gguf_problems, reload_gguf_problem, unread_reason
from auto_round.verify.logits import (
    RELOAD_LIMIT,
    RELOAD_TOLERANCE,
    artifact_logits,
    logit_distance,
    logit_error,
    reload_problem,
)
from auto_round.verify.mlx import is_mlx
from auto_round.verify.packed import reader_missing, reader_rounds_inputs
from auto_round.verify.result import Verification
from auto_round.verify.values import codes_problem, file_hashes, kept_problem, pieces_problem

if TYPE_CHECKING:
    from auto_round.compressors.base import Compressor


def folder_name(model: str, scheme: QuantizationScheme, gguf: bool = False) -> str:
    """`name-w4g128`: model, number family unless it is plain integers, width and groups; `name-gguf`.

    Without a positive group size, the width of activations stands for it: `name-w8a8`, `name-fp-w8afp8`.
    """
    if gguf:
        return f"{model}-gguf"
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


def prepare_output(folder: Path) -> None:
    """Make sure that the output can be written, before any work.

    Raises:
        OSError: the folder cannot be made or written.
    """
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        probe = parent / f".write-test-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise OSError(f"the output folder {parent} cannot be written ({error.strerror}): choose another") from error


def save(
    run: Compressor, store: Store, fmt: ExportFormat, final: Path, max_shard_size: int | str | None = None
) -> Path:
    """Write `final` in `fmt` and verify it. On failure nothing stands under that name.

    Raises:
        VerificationError: what was written is not what was quantized.
    """
    check_attention(fmt, store.facts.get("attention", {}))
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    began = time.monotonic()
    settings = {**_recorded(run), **store.facts.get("attention", {})}
    try:
        write = fmt.write_folder or functools.partial(write_folder, fmt=fmt)
        ledger = write(
            partial,
            run.streamed,
            run.plan,
            store,
            source_dir=run.source_dir,
            tokenizer=run.tokenizer,
            settings=settings,
            max_shard_size=max_shard_size or "5GB",
        )
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk is no place to leave half a model
        raise
    if fmt.plain and any(layer.scheme.act for layer in run.plan.quantized().values()):
        run.warnings.append(f"{fmt.name} holds weights only: whoever loads it does not quantize activations")
    run.times["export"] = time.monotonic() - began
    began = time.monotonic()
    checks = verify(run, store, ledger, partial, fmt)
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
    if run.needs_data:
        settings |= {"nsamples": run.calibration.nsamples, "seqlen": run.calibration.seqlen}
    return settings


def verify(
    run: Compressor,
    store: Store,
    ledger: Ledger,
    folder: Path,
    fmt: ExportFormat,
) -> Verification:
    """All checks on a written folder that the run's own knowledge allows."""
    result = Verification()
    if gguf_file(folder) is not None:
        _verify_gguf(run, store, ledger, result, gguf_file(folder))
        return result
    plain, attention = fmt.plain, stored_attention(run.streamed, run.plan, store, fmt)
    artifact = Artifact.open(folder)
    stems = {name: stem_of(run.streamed, name) for name in run.plan.quantized()}
    refused = refused_layers(run.streamed, run.plan) if plain else {}
    result.add("ledger", None, ", ".join(f"{n} {fate}" for fate, n in ledger.counts().items() if n))
    result.add("layout", layout_problem(artifact), "index, headers and configuration agree")
    problems = (codes_problem(artifact, run.plan, store, stems, part, refused, fmt.as_read) for part in run.plan.parts)
    result.add("reloaded = quantized", next(filter(None, problems), None), f"{len(stems)} layers read back bit for bit")
    kept = ledger.of("kept")
    result.add("kept = source", kept_problem(artifact, run.streamed, kept), f"{len(kept)} tensors byte for byte")
    loose = pieces(run.streamed, run.plan, plain)
    if loose:
        problem = pieces_problem(artifact, read_pieces(run.streamed, run.plan, store, plain))
        result.add("parts = source", problem, f"{len(loose)} parts of fused tensors")
    if attention:
        problem = pieces_problem(artifact, attention.items())
        result.add("attention scales", problem, f"{len(attention)} scales as calibrated")
    _verify_model(run, store, result)
    _verify_logits(run, store, result, artifact)
    return result


def _verify_model(run: Compressor, store: Store, result: Verification) -> None:
    """What holds of the quantized model in whatever file."""
    native = run.observe_original()
    result.add("replay = model", None, f"{len(native.blocks)} blocks, each run again on the same arguments")
    if run.streamed.replaced:
        detail = f"{len(run.streamed.replaced)} modules, at most {native.replacement_error:.1e} apart"
        result.add("unfused = fused", None, detail)
    if run.streamed.is_streamed:
        logits = artifact_logits(run.streamed, run.plan, store, native.batch, run.amp)
        finite = bool(torch.isfinite(logits).all())
        result.add("finite", None if finite else "the quantized model gives logits that are not finite", "logits")
        result.kl, result.top1 = logit_distance(native.logits, logits)


def _verify_gguf(run: Compressor, store: Store, ledger: Ledger, result: Verification, file: Path) -> None:
    result.add("ledger", None, ", ".join(f"{n} {fate}" for fate, n in ledger.counts().items() if n))
    problem = gguf_problems(file, run.streamed, run.plan, store)
    result.add("reloaded = quantized", problem, "every tensor reads back bit for bit")
    _verify_model(run, store, result)
    config = run.model.config
    unread = unread_reason(config) or _too_large(file.stat().st_size)
    if unread or not run.streamed.is_streamed:
        run.warnings += [unread] if unread else []
        return
    native = run.observe_original()
    logits = artifact_logits(run.streamed, run.plan, store, native.batch, contextlib.nullcontext)
    problem = reload_gguf_problem(file, native.batch, logits, config, _is_routed(run))
    result.add("loads in Transformers", problem, "logits of the reloaded model are the quantized model's")


def _too_large(nbytes: int) -> str | None:
    """Why Transformers is not made to load so much; None if it is."""
    if nbytes <= RELOAD_LIMIT:
        return None
    size, limit = nbytes >> 20, RELOAD_LIMIT >> 20
    return f"Transformers was not made to load the result: {size} MiB, the check stops at {limit} MiB"


def _verify_logits(run: Compressor, store: Store, result: Verification, artifact: Artifact) -> None:
    native = run.observe_original()
    foreign = "only mlx-lm loads the result, so it was not loaded" if is_mlx(artifact.quantization) else None
    missing = foreign or _too_large(artifact.checkpoint.nbytes) or reader_missing(artifact.quantization)
    if missing is not None:
        logger.info(missing)
        run.warnings.append(missing)
        return
    if not run.streamed.is_streamed:
        logits, result.kl, result.top1 = _reloaded_logits(run, artifact, native)
        finite = bool(torch.isfinite(logits).all())
        result.add("loads in Transformers", None if finite else "its logits are not finite", "logits are finite")
        return
    expected, tolerance = _expected_logits(run, store, artifact)
    routed = _is_routed(run)
    problem = reload_problem(artifact.folder, native.batch, expected, run.trust_remote_code, routed, tolerance)
    result.add("loads in Transformers", problem, "logits of the reloaded model are the quantized model's")


def _expected_logits(run: Compressor, store: Store, artifact: Artifact) -> tuple[torch.Tensor, float]:
    """What Transformers should compute, and how far it may be from that.

    It computes in the dtype that is stored: so do we, or rounding sends tokens to other experts. Where inputs are
    rounded to few bits, the last bit of a sum decides some codes: twice what that rounding itself does is allowed.
    """
    plan, batch = run.plan, run.observe_original().batch
    stems = {name: layer.info.stem for name, layer in plan.quantized().items()}

    def logits(rounds: Callable[[str], bool]) -> torch.Tensor:
        return artifact_logits(run.streamed, plan, store, batch, contextlib.nullcontext, rounds)

    def rounds(name: str) -> bool:
        return reader_rounds_inputs(artifact.quantization, stems[name])

    kept = {name: scale for block in plan.block_names for name, scale in store.beside(block).items()}
    cache = kept if _rounds_cache(artifact.quantization) else {}
    with rounded_cache(run.model, cache):
        expected = logits(rounds)
    if not cache and not any(layer.scheme.act and rounds(name) for name, layer in plan.quantized().items()):
        return expected, RELOAD_TOLERANCE
    return expected, max(RELOAD_TOLERANCE, 2 * logit_error(logits(lambda name: False), expected)[0])


def _rounds_cache(quantization: Mapping[str, Any] | None) -> bool:
    """Whether Transformers computes with keys and values in float8, as compressed-tensors makes it."""
    described = quantization or {}
    return bool(described.get("kv_cache_scheme")) and not described.get("dequantize")


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
        "layers": layer_list(run.plan),
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
        "estimate": run.estimate.to_dict() if run.estimate is not None else None,
        "settings": run.facts()["settings"],
        "versions": {name: version(name) for name in ("auto-round", "torch", "transformers", "safetensors")},
        "command": " ".join(sys.argv),
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
        "notes": list(data.notes),
    }
