"""A finished folder checked later, alone or against the original: `auto-round verify`."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from auto_round.modeling.blocks import find_stacks
from auto_round.modeling.checkpoint import CheckpointError
from auto_round.modeling.reading import AGAIN, kind_of, read_json, reading
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import OUTSIDE
from auto_round.utils.common import all_finite, is_supported_layer, is_transposed
from auto_round.utils.model import load_streamed, load_tokenizer, only_gguf
from auto_round.verify.artifact import Artifact, layout_problem
from auto_round.verify.mlx import is_mlx
from auto_round.verify.result import Verification
from auto_round.verify.values import file_hashes


def verify_artifact(
    folder: str | Path, against: str | Path | None = None, trust_remote_code: bool = False
) -> Verification:
    """Repeat the checks on a finished folder; with `against`, the original, also those that compare with it.

    Raises:
        CheckpointError: the folder, or the original, cannot be read at all.
    """
    folder = Path(folder)
    result = Verification()
    if only_gguf(folder):
        _verify_gguf(result, folder, against, trust_remote_code)
        return result
    with reading(f"{folder}: quantization_config of config.json"):
        artifact = Artifact.open(folder)
        layers = len(artifact.packed_layers())
        result.add("layout", layout_problem(artifact), f"{layers} packed layers, index and headers agree")
        if not result.passed:
            return result
        result.add("finite", _finite_problem(artifact), "all scales and floats are finite")
    _verify_unchanged(result, folder)
    if against is not None and result.passed:
        _verify_against(result, artifact, Path(against), trust_remote_code)
    return result


def _verify_unchanged(result: Verification, folder: Path) -> None:
    """Files are those that the report of the run lists."""
    report = folder / "report.json"
    if not report.exists():
        return
    known = read_json(report).get("files", {})
    if not isinstance(known, dict):
        raise CheckpointError(f"{report}: files is {kind_of(known)}, not hashes by name: {AGAIN}")
    found = file_hashes(folder)
    changed = sorted(name for name in known if found.get(name) != known[name])
    problem = f"{changed[0]} was changed after it was written" if changed else None
    result.add("unchanged", problem, f"{len(known)} files")


def _verify_gguf(result: Verification, folder: Path, against: str | Path | None, trust_remote_code: bool) -> None:
    """A folder that holds a GGUF file: its tensors, its hash, and its predictions beside the original's."""
    from auto_round.verify.gguf import gguf_file, open_gguf, unreadable_values

    reader = open_gguf(gguf_file(folder))
    result.add("layout", None, f"{len(reader.tensors)} tensors")
    result.add("finite", unreadable_values(reader), "all tensors dequantize to finite numbers")
    _verify_unchanged(result, folder)
    if against is not None and result.passed:
        _compare(result, folder, Path(against), trust_remote_code)


def _finite_problem(artifact: Artifact) -> str | None:
    for name, entry in artifact.checkpoint.entries.items():
        if entry.dtype.is_floating_point and not all_finite(artifact.checkpoint.read_one(name)):
            return f"{name} holds NaN or Inf"
    for layer in artifact.packed_layers():
        if not all_finite(artifact.weight(layer)):
            return f"{layer} dequantizes to NaN or Inf"
    return None


def _verify_against(result: Verification, artifact: Artifact, against: Path, trust_remote_code: bool) -> None:
    streamed = load_streamed(against, trust_remote_code)
    streamed.set_blocks([name for stack in find_stacks(streamed.model) for name in stack])
    packed = set(artifact.packed_layers())
    stored = {*artifact.checkpoint.names(), *(f"{layer}.weight" for layer in packed)}
    regrouped = {
        key
        for group in streamed.names.groups.values()
        if stored.issuperset(group.written.values())
        for key in group.sources
    }
    source = streamed.source_tensors()
    lost = [name for name in source if name not in stored and name not in regrouped]
    result.add("ledger", f"{lost[0]} of the original is missing" if lost else None, f"{len(source)} source tensors")
    result.add("weights", _distance_problem(artifact, streamed), f"{len(packed)} layers are close to the original")
    if result.passed and not is_mlx(artifact.quantization):  # which Transformers does not load
        _compare(result, artifact.folder, against, trust_remote_code)


def _compare(result: Verification, folder: Path, against: Path, trust_remote_code: bool) -> None:
    """How far the predictions are from the original's, on held-out text."""
    from auto_round.eval.divergence import divergence
    from auto_round.eval.perplexity import read_windows
    from auto_round.inference.load import load_model

    tokenizer = load_tokenizer(against, trust_remote_code)
    if tokenizer is None:
        return
    models = (load_model(path, trust_remote_code) for path in (folder, against))
    measured = divergence(*models, read_windows(tokenizer, None, 256, 8))
    result.kl, result.top1 = measured.kl, measured.top1


def _distance_problem(artifact: Artifact, streamed: StreamedModel) -> str | None:
    """A quantized layer whose error is as large as the weights themselves is a layer in the wrong place."""
    packed = set(artifact.packed_layers())
    for part in (*streamed.blocks, OUTSIDE):
        with streamed.loaded(part) if part != OUTSIDE else contextlib.nullcontext():
            for name, module in streamed.model.named_modules():
                if (streamed.block_of(name) or OUTSIDE) != part or not is_supported_layer(module):
                    continue
                stem = streamed.source_name(f"{name}.weight").removesuffix(".weight")
                problem = _layer_distance(artifact, stem, module) if stem in packed else None
                if problem is not None:
                    return problem
                packed.discard(stem)
    if packed:
        raise CheckpointError(
            f"{streamed.checkpoint.directory} has no {sorted(packed)[0]}: is it the original of {artifact.folder}?"
        )
    return None


def _layer_distance(artifact: Artifact, stem: str, module: torch.nn.Module) -> str | None:
    want, got = module.weight.float().cpu(), artifact.weight(stem)
    want = want.t() if is_transposed(module) else want
    if want.shape != got.shape:
        return f"{stem} has shape {tuple(got.shape)}, the original {tuple(want.shape)}"
    error = ((got - want).norm() / want.norm().clamp(min=1e-12)).item()
    return None if error < 0.9 else f"{stem} is {error:.0%} away from the original's weight"
