"""The checks on a written folder: what a run knows of its model, held against what can be read back from disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from auto_round.calibration.attention import rounded_cache
from auto_round.calibration.cpu_linear import EvenRows
from auto_round.calibration.native import no_cache, run_logits
from auto_round.formats.base import ExportFormat
from auto_round.formats.export import Ledger, stored_attention
from auto_round.formats.parts import pieces, read_pieces, refused_layers, stem_of
from auto_round.inference.load import load_model
from auto_round.logger import logger
from auto_round.store import Store
from auto_round.utils.common import all_finite
from auto_round.verify.artifact import Artifact, layout_problem
from auto_round.verify.gguf import gguf_file, gguf_problems, reload_gguf_problem, unread_reason
from auto_round.verify.logits import RELOAD_TOLERANCE, artifact_logits, logit_distance, logit_error, reload_problem
from auto_round.verify.mlx import is_mlx
from auto_round.verify.packed import reader_missing, reader_rounds_inputs
from auto_round.verify.result import Verification
from auto_round.verify.values import codes_problem, kept_problem, pieces_problem

if TYPE_CHECKING:
    from auto_round.compressors.base import Compressor


def verify(run: Compressor, store: Store, ledger: Ledger, folder: Path, fmt: ExportFormat) -> Verification:
    """All checks on a written folder that the run's own knowledge allows."""
    result = Verification()
    if gguf_file(folder) is not None:
        _verify_gguf(run, store, ledger, result, gguf_file(folder))
        return result
    plain, plan = fmt.plain, fmt.plan
    attention = stored_attention(run.streamed, plan, store, fmt)
    artifact = Artifact.open(folder)
    stems = {name: stem_of(run.streamed, name) for name in plan.quantized()}
    refused = refused_layers(run.streamed, plan) if plain else {}
    result.add("ledger", None, ", ".join(f"{n} {fate}" for fate, n in ledger.counts().items() if n))
    result.add("layout", layout_problem(artifact), "index, headers and configuration agree")
    problems = (codes_problem(artifact, plan, store, stems, part, refused, fmt.as_read) for part in plan.parts)
    result.add("reloaded = quantized", next(filter(None, problems), None), f"{len(stems)} layers read back bit for bit")
    kept = ledger.of("kept")
    result.add("kept = source", kept_problem(artifact, run.streamed, kept), f"{len(kept)} tensors byte for byte")
    loose = pieces(run.streamed, plan, plain)
    if loose:
        problem = pieces_problem(artifact, read_pieces(run.streamed, plan, store, plain))
        result.add("parts = source", problem, f"{len(loose)} parts of fused tensors")
    if attention:
        problem = pieces_problem(artifact, attention.items())
        result.add("attention scales", problem, f"{len(attention)} scales as calibrated")
    known = _verify_model(run, store, result)
    _verify_logits(run, store, result, artifact, known)
    return result


def _verify_model(run: Compressor, store: Store, result: Verification) -> torch.Tensor | None:
    """What holds of the quantized model in whatever file; returns its logits on the check batch if it is streamed."""
    native = run.observe_original()
    result.add("replay = model", None, f"{len(native.blocks)} blocks, each run again on the same arguments")
    if run.streamed.replaced:
        detail = f"{len(run.streamed.replaced)} modules, at most {native.replacement_error:.1e} apart"
        result.add("unfused = fused", None, detail)
    if run.streamed.is_streamed:
        logits = artifact_logits(run.streamed, run.plan, store, native.batch, run.amp)
        finite = all_finite(logits)
        result.add("finite", None if finite else "the quantized model gives logits that are not finite", "logits")
        result.kl, result.top1 = logit_distance(native.logits, logits)
        return logits
    return None


def _verify_gguf(run: Compressor, store: Store, ledger: Ledger, result: Verification, file: Path) -> None:
    result.add("ledger", None, ", ".join(f"{n} {fate}" for fate, n in ledger.counts().items() if n))
    problem = gguf_problems(file, run.streamed, run.plan, store)
    result.add("reloaded = quantized", problem, "every tensor reads back bit for bit")
    _verify_model(run, store, result)
    config = run.model.config
    unread = unread_reason(config) or _too_large(file.stat().st_size, run.working.reload)
    if unread or not run.streamed.is_streamed:
        run.warnings += [unread] if unread else []
        return
    native = run.observe_original()
    logits = artifact_logits(run.streamed, run.plan, store, native.batch, contextlib.nullcontext)
    problem = reload_gguf_problem(file, native.batch, logits, config, _is_routed(run))
    result.add("loads in Transformers", problem, "logits of the reloaded model are the quantized model's")


def _too_large(nbytes: int, most: int) -> str | None:
    """Why Transformers is not made to load so much; None if it is."""
    if nbytes <= most:
        return None
    size, limit = nbytes >> 20, most >> 20
    return f"Transformers was not made to load the result: {size} MiB, the check stops at {limit} MiB"


def _verify_logits(
    run: Compressor, store: Store, result: Verification, artifact: Artifact, known: torch.Tensor | None
) -> None:
    """Transformers loads the folder. known: the quantized model's logits, as blocks are run here."""
    native = run.observe_original()
    foreign = "only mlx-lm loads the result, so it was not loaded" if is_mlx(artifact.quantization) else None
    missing = (
        foreign or _too_large(artifact.checkpoint.nbytes, run.working.reload) or reader_missing(artifact.quantization)
    )
    if missing is not None:
        logger.info(missing)
        run.warnings.append(missing)
        return
    if not run.streamed.is_streamed:
        logits, result.kl, result.top1 = _reloaded_logits(run, artifact, native)
        finite = all_finite(logits)
        result.add("loads in Transformers", None if finite else "its logits are not finite", "logits are finite")
        return
    trust, routed = run.trust_remote_code, _is_routed(run)
    if known is not None and not run.autocasts and not _rounds_anything(run, store):
        problem = reload_problem(artifact.folder, native.batch, known, trust, routed, amp=run.amp)
    else:
        with EvenRows():
            expected, tolerance = _expected_logits(run, store, artifact)
            problem = reload_problem(artifact.folder, native.batch, expected, trust, routed, tolerance)
    result.add("loads in Transformers", problem, "logits of the reloaded model are the quantized model's")


def _rounds_anything(run: Compressor, store: Store) -> bool:
    """Whether the quantized model rounds what enters layers, or keys and values: not every reader does the same."""
    inputs = any(layer.scheme.act for layer in run.plan.quantized().values())
    return inputs or any(store.beside(block) for block in run.plan.block_names)


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
