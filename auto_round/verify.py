"""Checks of a written folder, by a reader that shares no code with the one that wrote it.

Codes are unpacked with NumPy from the description of the layout, tensors are compared with the store and the source,
and the model is run on the quantized weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from auto_round.algorithms.base import put_weights
from auto_round.modeling.blocks import find_stacks
from auto_round.modeling.checkpoint import Checkpoint, CheckpointError
from auto_round.modeling.fused_moe.layout import Slice
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import OUTSIDE, ModelPlan
from auto_round.store import Store
from auto_round.tied import put_tied
from auto_round.utils.common import is_supported_layer, is_transposed
from auto_round.utils.device import trim_memory
from auto_round.verify_packed import PACKED, compressed_problem, is_compressed, read_compressed

RELOAD_LIMIT = 512 << 20  # bytes of checkpoint up to which Transformers itself is made to load it
RELOAD_TOLERANCE = 2e-2  # relative difference of logits; the dequantized weights are compared bit for bit
AWQ_SLOTS = (0, 4, 1, 5, 2, 6, 3, 7)  # slot of each output channel within a group of eight


class VerificationError(RuntimeError):
    """A written folder is not what was quantized; names what failed."""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


@dataclass
class Verification:
    """The checks made, and how far the artifact's output is from the original's."""

    checks: list[Check] = field(default_factory=list)
    kl: float | None = None
    top1: float | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def add(self, name: str, problem: str | None, detail: str) -> None:
        self.checks.append(Check(name, problem is None, problem or detail))

    def raise_if_failed(self, folder: Path) -> None:
        for check in self.checks:
            if not check.passed:
                raise VerificationError(f"{folder} failed the check '{check.name}': {check.detail}")


# ---- the independent reader ----------------------------------------------------------------------------------


def bit_fields(words: np.ndarray, bits: int) -> np.ndarray:
    """[n·bits/32, m] int32 words → [n, m] codes: a little-endian bit stream runs down each column."""
    columns = words.shape[1]
    groups = np.ascontiguousarray(words).view(np.uint32).reshape(-1, bits, columns)  # 32 codes to a group
    codes = np.empty((groups.shape[0], 32, columns), np.uint8)
    for position in range(32):
        word, shift = divmod(position * bits, 32)
        field = groups[:, word] >> np.uint32(shift)
        if shift + bits > 32:  # the code straddles two words
            field |= groups[:, word + 1] << np.uint32(32 - shift)
        codes[:, position] = field & np.uint32((1 << bits) - 1)
    return codes.reshape(-1, columns)


def awq_fields(words: np.ndarray) -> np.ndarray:
    """[m, n/8] int32 words → [n, m] 4-bit codes in logical order of the n output channels."""
    slots = bit_fields(words.T, 4).reshape(-1, 8, words.shape[0])
    return slots[:, list(AWQ_SLOTS)].reshape(-1, words.shape[0])


def read_layer(tensors: Mapping[str, torch.Tensor], bits: int, packing: str) -> torch.Tensor:
    """float32 [out, in] weight of a packed layer (`qweight`, `qzeros`, `scales`)."""
    weight, zeros = tensors["qweight"].numpy(), tensors["qzeros"].numpy()
    if packing.endswith("awq"):
        codes, zero = awq_fields(weight).T, awq_fields(zeros).T  # [in, out], [groups, out]
    else:
        codes, zero = bit_fields(weight, bits), bit_fields(zeros.T, bits).T
    zero = zero.astype(np.float32) + (1.0 if packing.endswith("auto_gptq") else 0.0)
    scales = tensors["scales"].float()  # [groups, out]
    columns, rows = codes.shape
    centred = torch.from_numpy(codes).view(len(scales), -1, rows).float().sub_(torch.from_numpy(zero)[:, None, :])
    return centred.mul_(scales[:, None, :]).view(columns, rows).t()


def stored_as(quantization: Mapping[str, Any], layer: str) -> tuple[int, str]:
    """(bits, packing) of a packed layer by the checkpoint's configuration: AutoRound's, GPTQ's or AWQ's."""
    method = quantization.get("quant_method")
    fields: Mapping[str, Any] = quantization.get("extra_config", {}).get(layer, {})
    kept = method == "awq" and layer in (quantization.get("modules_to_not_convert") or ())
    for rule, values in (quantization.get("dynamic") or {}).items() if method == "gptq" else ():
        if re.match(rule.removeprefix("+:").removeprefix("-:"), layer):
            fields, kept = values, rule.startswith("-:")
            break
    if kept:
        raise VerificationError(f"{layer} is packed, but config.json says that it is not quantized")
    packing = {"gptq": "auto_gptq", "awq": "awq"}.get(method) or quantization.get("packing_format", "")
    return int(fields.get("bits", quantization["bits"])), packing


@dataclass(frozen=True)
class Artifact:
    """A written folder as its files describe it."""

    folder: Path
    checkpoint: Checkpoint
    quantization: dict[str, Any] | None

    @classmethod
    def open(cls, folder: Path) -> Artifact:
        checkpoint = Checkpoint(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(folder, checkpoint, config.get("quantization_config"))

    def packed_layers(self) -> list[str]:
        if is_compressed(self.quantization):
            return [name.removesuffix(PACKED) for name in self.checkpoint.names() if name.endswith(PACKED)]
        return [name.removesuffix(".qweight") for name in self.checkpoint.names() if name.endswith(".qweight")]

    def weight(self, layer: str) -> torch.Tensor:
        """float32 [out, in] of a packed layer."""
        if is_compressed(self.quantization):
            return read_compressed(self.checkpoint, self.quantization, layer)
        names = {suffix: f"{layer}.{suffix}" for suffix in ("qweight", "qzeros", "scales")}
        tensors = self.checkpoint.read(names.values())
        parts = {suffix: tensors[name] for suffix, name in names.items()}
        return read_layer(parts, *stored_as(self.quantization, layer))


# ---- single checks: None when passed, else what is wrong --------------------------------------------------------


def layout_problem(artifact: Artifact) -> str | None:
    """Index, headers and configuration agree, and no layer is stored twice."""
    compressed = is_compressed(artifact.quantization)
    if compressed and (problem := compressed_problem(artifact.checkpoint, artifact.quantization)):
        return problem
    for layer in () if compressed else artifact.packed_layers():
        missing = [s for s in ("qzeros", "scales") if f"{layer}.{s}" not in artifact.checkpoint]
        if missing:
            return f"{layer} has no {missing[0]}"
        if f"{layer}.weight" in artifact.checkpoint:
            return f"{layer} is stored twice, packed and as floats"
    index = artifact.folder / "model.safetensors.index.json"
    if index.exists():
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        stray = listed.symmetric_difference(artifact.checkpoint.names())
        if stray:
            return f"index and shards disagree about {sorted(stray)[0]}"
    if artifact.packed_layers() and not artifact.quantization:
        return "layers are packed, but config.json has no quantization_config"
    return None


def codes_problem(
    artifact: Artifact,
    plan: ModelPlan,
    store: Store,
    stems: Mapping[str, str],
    part: str,
    refused: Mapping[str, tuple[str, Slice]] | None = None,
) -> str | None:
    """What a reader dequantizes of a block equals, bit for bit, what the tuning decided.

    refused: layers that an ordinary checkpoint holds inside a fused tensor.
    """
    layers = plan.quantized(part)
    for name, tensor in store.load(part, layers).tensors.items():
        if refused and name in refused:
            stored, place = refused[name]
            read = place.take(artifact.checkpoint.read_one(stored))
        elif artifact.quantization is None:
            read = artifact.checkpoint.read_one(f"{stems[name]}.weight")
            read = read.t() if layers[name].info.transposed else read
        else:
            read = artifact.weight(stems[name])
        if not torch.equal(read, tensor.dequantize(read.dtype)):
            return f"{name} reads back differently from what was quantized"
        if not torch.isfinite(tensor.scale).all():
            return f"{name} holds scales that are not finite"
    trim_memory()
    return None


def kept_problem(artifact: Artifact, streamed: StreamedModel, names: list[str]) -> str | None:
    """Tensors that are not quantized are the source's, byte for byte."""
    for name in names:
        if name not in artifact.checkpoint:
            return f"{name} is missing"
        mine, source = artifact.checkpoint.read_one(name), streamed.read_source(name)
        same = mine.dtype == source.dtype and mine.shape == source.shape
        if not same or not torch.equal(_bytes(mine), _bytes(source)):
            return f"{name} differs from the source"
    return None


def pieces_problem(artifact: Artifact, values: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Parts of source tensors that are stored as floats equal what the model holds."""
    for name, value in values:
        if name not in artifact.checkpoint:
            return f"{name} is missing"
        if not torch.equal(_bytes(artifact.checkpoint.read_one(name)), _bytes(value)):
            return f"{name} differs from the source"
    return None


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder but its reports."""
    hashes = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("report."):
            digest = hashlib.sha256()
            with open(file, "rb") as handle:
                while part := handle.read(1 << 22):
                    digest.update(part)
            hashes[file.relative_to(folder).as_posix()] = digest.hexdigest()
    return hashes


# ---- running the artifact ---------------------------------------------------------------------------------------


@torch.no_grad()
def artifact_logits(streamed: StreamedModel, plan: ModelPlan, store: Store, batch, amp) -> torch.Tensor:
    """Logits of the streamed model on the quantized weights, block by block; `codes_problem` ties them to the file."""
    from auto_round.calibration.native import no_cache, run_logits

    def put(part: str, module: torch.nn.Module, prefix: str) -> None:
        if part in plan.parts:
            layers = plan.quantized(part)
            put_weights(module, prefix, store.load(part, layers).tensors, layers)
        if part != OUTSIDE:
            put_tied(streamed.model, plan, store, part)

    outside = {name: streamed.model.get_submodule(name).weight.clone() for name in plan.quantized(OUTSIDE)}
    put(OUTSIDE, streamed.model, "")
    try:
        with streamed.streaming(lambda block, module: put(block, module, block)) as model, no_cache(model), amp():
            return run_logits(model, batch, streamed.device)
    finally:
        for name, weight in outside.items():
            streamed.model.get_submodule(name).weight.copy_(weight)


@torch.no_grad()
def logit_distance(original: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """(mean KL(original ‖ other) in nats per token, top-1 agreement) of logits [batch, length, vocabulary]."""
    kl, agree, tokens = 0.0, 0, 0
    for one, two in zip(original.flatten(0, 1).split(64), other.flatten(0, 1).split(64), strict=True):
        p, q = one.float().log_softmax(-1), two.float().log_softmax(-1)
        kl += (p.exp() * (p - q)).sum(dtype=torch.float64).item()
        agree += int((one.argmax(-1) == two.argmax(-1)).sum())
        tokens += one.shape[0]
    return kl / tokens, agree / tokens


MASKED = 1e4  # logits beyond this are masks that a model puts over some columns


@torch.no_grad()
def logit_error(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """‖got - want‖ / ‖want‖ of logits: over all tokens, and the bound that three quarters of the tokens keep.

    A few rows at a time: a vocabulary can be large.
    """
    squares, wanted = [], []
    for one, two in zip(got.flatten(0, -2).split(64), want.flatten(0, -2).split(64), strict=True):
        real = two.abs() < MASKED
        squares.append(torch.where(real, one.float() - two.float(), 0).square().sum(-1))
        wanted.append(torch.where(real, two.float(), 0).square().sum(-1))
    difference, norm = torch.cat(squares), torch.cat(wanted).clamp(min=1e-30)
    per_token = (difference / norm).sqrt()
    return (difference.sum() / norm.sum()).sqrt().item(), per_token.nan_to_num(1e9).quantile(0.75).item()


@torch.no_grad()
def reload_problem(
    folder: Path, batch, expected: torch.Tensor, trust_remote_code: bool, routed: bool = False
) -> str | None:
    """Transformers loads the folder, and computes the logits of the quantized model.

    routed: tokens choose among experts. A rounding error can send a few of them elsewhere, so three quarters of the
    tokens must agree instead of all of them; a wrong model is wrong nearly everywhere.
    """
    from auto_round.calibration.native import no_cache, run_logits
    from auto_round.utils.model import load_model

    model = load_model(folder, trust_remote_code)
    with no_cache(model):
        got = run_logits(model, batch, "cpu")
    overall, most = logit_error(got, expected)
    if not (overall <= RELOAD_TOLERANCE or (routed and most <= RELOAD_TOLERANCE)):
        return f"logits of the model loaded by Transformers are {overall:.2%} away from the quantized model's"
    return None


# ---- a finished folder, later -------------------------------------------------------------------------------------


def verify_artifact(
    folder: str | Path, against: str | Path | None = None, trust_remote_code: bool = False
) -> Verification:
    """Repeat the checks on a finished folder; with `against`, the original, also those that compare with it.

    Raises:
        CheckpointError: the folder, or the original, cannot be read at all.
    """
    folder = Path(folder)
    artifact = Artifact.open(folder)
    result = Verification()
    layers = len(artifact.packed_layers())
    result.add("layout", layout_problem(artifact), f"{layers} packed layers, index and headers agree")
    if not result.passed:
        return result
    result.add("finite", _finite_problem(artifact), "all scales and floats are finite")
    report = folder / "report.json"
    if report.exists():
        known = json.loads(report.read_text(encoding="utf-8")).get("files", {})
        found = file_hashes(folder)
        changed = sorted(name for name in known if found.get(name) != known[name])
        result.add(
            "unchanged", f"{changed[0]} was changed after it was written" if changed else None, f"{len(known)} files"
        )
    if against is not None and result.passed:
        _verify_against(result, artifact, Path(against), trust_remote_code)
    return result


def _finite_problem(artifact: Artifact) -> str | None:
    for name, entry in artifact.checkpoint.entries.items():
        if entry.dtype.is_floating_point and not torch.isfinite(artifact.checkpoint.read_one(name).float()).all():
            return f"{name} holds NaN or Inf"
    for layer in artifact.packed_layers():
        if not artifact.weight(layer).isfinite().all():
            return f"{layer} dequantizes to NaN or Inf"
    return None


def _verify_against(result: Verification, artifact: Artifact, against: Path, trust_remote_code: bool) -> None:
    from auto_round.eval.divergence import divergence
    from auto_round.eval.perplexity import read_windows
    from auto_round.utils.model import load_model, load_streamed, load_tokenizer

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
    tokenizer = load_tokenizer(against, trust_remote_code)
    if tokenizer is None:
        return
    measured = divergence(
        load_model(artifact.folder, trust_remote_code),
        load_model(against, trust_remote_code),
        read_windows(tokenizer, None, 256, 8),
    )
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
