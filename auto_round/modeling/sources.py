"""Models that are stored quantized, read as the float models that they stand for.

FP8, MXFP4, NVFP4 and packed-integer checkpoints keep a weight as codes and scales. `open_checkpoint` gives a
`DequantizedCheckpoint`, which shows each such weight under its float name and computes it when it is asked for:
w = (value(code) - zero) · scale in float32, rounded once to the wanted dtype. What vanishes is named with its reason:
codes and scales, and the calibrated activation and cache scales, which say how the stored model was run and not what
its weights are. Config.json's `quant_method` decides how to read (`READERS`), the stored tensors what is quantized.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auto_round.formats.packing import unpack_bits
from auto_round.modeling.checkpoint import Checkpoint, CheckpointError, DequantizedCheckpoint, TensorEntry
from auto_round.modeling.reading import reading
from auto_round.utils.patterns import match

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_PAIRS = torch.stack([E2M1.repeat(16), E2M1.repeat_interleave(16)], dim=1)  # byte → values of its low, high nibble
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_CHUNK = 1 << 18  # values decoded at once: bounds the float32 temporaries, and they stay in the cache
_LOW_BIT = ("gptq", "gptqmodel", "awq", "auto-round", "auto_round", "intel/auto-round", "bitsandbytes")
_CT_FORMAT = re.compile(r"dense|mixed-precision|(pack|int|float|naive|mxfp8|mxfp4-pack|nvfp4-pack)-quantized")
_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")

_SCALE = re.compile(r".*[._](q?scale(_inv|_2|_weight)?|zero_point)")
_ACTIVATION = re.compile(r"(.+)[._](input|output|activation)_(scale|scale_ub|zero_point|global_scale)|(.+)\.qscale_act")
_CACHE = re.compile(r".+[._](q|k|v|kv|prob)_(scale|zero_point)")
_HELPER = re.compile(r"(.+\.weight)_(scale|scale_inv|scale_2|zero_point|global_scale|shape|g_idx|packed)")


# ---- decoders: pure functions ---------------------------------------------------------------------------------------


def scale_to_float(scale: torch.Tensor) -> torch.Tensor:
    """Scales as float32. A byte is E8M0: 2^(byte - 127), 255 is NaN (OCP Microscaling Formats v1.0)."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [..., n] → float32 [..., 2n]: two FP4 values each, the first in the low nibble.

    A nibble is sign, two exponent bits of bias 1 and one mantissa bit (OCP Microscaling Formats v1.0).
    """
    pairs = _PAIRS.index_select(0, packed.contiguous().view(torch.uint8).flatten().int())
    return pairs.view(*packed.shape[:-1], -1)


def unpack_ints(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words [rows, n] → signed float32 codes [rows, ≥ n·32/bits].

    compressed-tensors' layout: code i of a row, offset by 2^(bits-1) to be unsigned, at bits [i·bits, (i+1)·bits) of a
    little-endian stream of words; the last word of a row may be partly filled.
    """
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits))
    return unpack_bits(padded, bits).float().sub_(1 << (bits - 1))


def scale_rows(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, columns: torch.Tensor
) -> torch.Tensor:
    """(v - zero) · scale in place: a row's scales [rows, groups], column j of group `columns[j]`.

    A single group is broadcast, as are per-tensor and per-channel scales. Blocks (128 × 128 in DeepSeek-V3, arXiv
    2412.19437 §3.3) become this when a block's scales are repeated for each of its rows.
    """
    for factor, apply in ((zero, values.sub_), (scale, values.mul_)):
        if factor is not None:
            apply(factor if factor.shape[1] == 1 else factor.index_select(1, columns))
    return values


# ---- one weight -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredWeight:
    """A float tensor and how it is stored.

    Attributes:
        shape: rows and columns as the codes have them, [..., rows, columns].
        parts: role → stored tensor; "codes" and "scale" always, the others where the format has them.
        grid: shape of the scales, [..., row blocks, column blocks].
        block: rows and columns that share a scale; edges may cut the last ones.
        unpack: codes of some rows → their float32 values, possibly with padding behind the last column.
        transposed: whether the float tensor is [..., columns, rows].
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    grid: tuple[int, ...]
    block: tuple[int, int]
    unpack: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float
    transposed: bool = False

    @property
    def float_shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.shape
        return (*lead, columns, rows) if self.transposed else self.shape

    def decode(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The float tensor from its parts by role."""
        rows, width = self.shape[-2:]
        scale, zero = self._scales(tensors), self._zeros(tensors)
        columns = torch.arange(width) // self.block[1]
        groups = tensors.get("column groups")
        if groups is not None and (groups >= 0).all():  # -1 marks an order that was never set
            columns = groups.long()
        result = torch.empty(self.float_shape, dtype=dtype)
        matrices = result.view(math.prod(result.shape[:-2]), *result.shape[-2:])
        codes = tensors["codes"].reshape(len(matrices), rows, -1)
        step = max(1, _CHUNK // max(width, 1))
        for index, matrix in enumerate(matrices):
            target = matrix.t() if self.transposed else matrix
            for top in range(0, rows, step):
                line = torch.arange(top, min(top + step, rows)) // self.block[0]
                values = self.unpack(codes[index, top : top + step])[:, :width]
                offset = None if zero is None else zero[index].index_select(0, line)
                factor = scale[index].index_select(0, line)
                target[top : top + step] = scale_rows(values, factor, offset, columns)
        return result

    def _scales(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scale = scale_to_float(tensors["scale"])
        if "global divisor" in tensors:
            scale = scale / tensors["global divisor"].float()
        if "global factor" in tensors:
            scale = scale * tensors["global factor"].float()
        if not scale.isfinite().all():
            raise CheckpointError(f"{self.parts['scale']!r} holds scales that are not finite")
        return self._spread(scale)

    def _zeros(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if (zero := tensors.get("zero points")) is None:
            return None
        if zero.dtype == tensors["codes"].dtype == torch.int32 and zero.dim() == 2:  # packed along the rows
            zero = self.unpack(zero.t().contiguous()).t()[: self.grid[-2]]
        if zero.numel() != math.prod(self.grid):
            raise CheckpointError(f"{self.parts['zero points']!r} does not fit the scales of {self.name!r}")
        return self._spread(zero.float())

    def _spread(self, grid: torch.Tensor) -> torch.Tensor:
        return grid.reshape(self.grid).expand(*self.shape[:-2], *self.grid[-2:]).reshape(-1, *self.grid[-2:])


def _dropped(source: Checkpoint, weights: Mapping[str, StoredWeight]) -> dict[str, str]:
    """Every stored tensor that the float model does not have, with the reason."""
    dropped = {
        stored: f"{role} of {weight.name}, dequantized"
        for weight in weights.values()
        for role, stored in weight.parts.items()
        if stored != weight.name
    }
    for name in source.names():
        if name in dropped or name in weights:
            continue
        if match := _ACTIVATION.fullmatch(name):
            owner = match[1] or match[4]
            if owner in weights or f"{owner}.weight" in weights:
                dropped[name] = f"activation quantization of {owner}, which the float model has not"
        elif _CACHE.fullmatch(name):
            dropped[name] = "quantization of the attention cache, which the float model has not"
        elif match := _HELPER.fullmatch(name):
            owner, kind = match[1], match[2].replace("_", " ")
            is_float = owner in source and owner not in weights and source.entries[owner].dtype.itemsize > 1
            if not is_float and (owner not in weights or kind != "shape"):
                problem = f"is not understood beside {owner!r}" if owner in source else f"has no {owner!r} to scale"
                raise CheckpointError(f"{source.directory}: {name!r} {problem}")
            dropped[name] = f"{kind} of {owner}, " + ("which is stored as floats" if is_float else "dequantized")
    return dropped


# ---- readers: config.json's quantization_config and the stored names → weights ---------------------------------------


def _scale_of(source: Checkpoint, codes: str) -> str | None:
    """The scale that belongs to codes, by the names in use (the last two: DeepSeek-V4, Mistral)."""
    stem = codes.removesuffix("_packed")
    names = [f"{stem}_scale_inv", f"{stem}_scale"]
    if stem.endswith(".weight"):
        names += [f"{stem.removesuffix('weight')}scale", f"{stem.removesuffix('weight')}qscale_weight"]
    return next((name for name in names if name in source), None)


def _fit(shape: tuple[int, ...], found: tuple[int, ...], block: tuple[int, int] | None, free: bool):
    """(grid, block) of scales of shape `found`: one to a `block`, or (`free`, or no block) to the tensor, the expert,
    half the rows of a fused expert, the row, or the column of an expert. None where they do not fit."""
    lead, (rows, columns) = shape[:-2], shape[-2:]
    if block is not None:
        grid = (*lead, -(-rows // block[0]), -(-columns // block[1]))
        if found == grid:
            return grid, block
        if not free:
            return None
    if math.prod(found) == 1:
        grid = (1,) * len(shape)
    elif lead and found in (lead, (*lead, 1)):
        grid = (*lead, 1, 1)
    elif found in ((rows,), (*lead, rows, 1)):
        grid = (*lead, rows, 1)
    elif lead and found in ((*lead, 1, 1), (*lead, 1, columns), (*lead, 2, 1)) and rows % found[-2] == 0:
        grid = found
    else:
        return None
    return grid, (rows // grid[-2], columns // grid[-1])


def _weight(
    source: Checkpoint,
    codes: str,
    block: tuple[int, int] | None,
    free: bool = False,
    shape: tuple[int, ...] | None = None,
    unpack: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float,
    **parts: str,
) -> StoredWeight:
    """A weight by the name of its codes, its scale found and checked; further parts as role="stored name"."""
    entry = source.entries[codes]
    shape = shape or entry.shape
    if (scale := _scale_of(source, codes)) is None:
        problem = f"{codes!r} is stored as {str(entry.dtype).removeprefix('torch.')} without its scale"
        raise CheckpointError(f"{source.directory}: {problem}: its values are unknown, download it again")
    found = source.entries[scale].shape
    fitted = _fit(shape, found, block, free) if len(shape) > 1 and min(shape) > 0 else None
    if fitted is None:
        blocks = f" in blocks of {block[0]} x {block[1]}" if block else ""
        problem = f"{scale!r} of shape {found} does not scale {codes!r} of shape {shape}{blocks}"
        raise CheckpointError(f"{source.directory}: {problem}")
    zero = f"{codes.removesuffix('_packed')}_zero_point"
    roles = {"codes": codes, "scale": scale, **({"zero points": zero} if zero in source else {})}
    roles |= {role.replace("_", " "): name for role, name in parts.items()}
    return StoredWeight(codes.removesuffix("_packed"), shape, roles, *fitted, unpack)


def _fp4(source: Checkpoint, codes: str, group: int, **parts: str) -> StoredWeight:
    """Two E2M1 values to a byte along the last dimension, a scale to each `group` of them."""
    *lead, half = source.entries[codes].shape
    return _weight(source, codes, (1, group), shape=(*lead, 2 * half), unpack=unpack_e2m1, **parts)


def _coded(source: Checkpoint, *dtypes: torch.dtype) -> Iterator[tuple[str, TensorEntry]]:
    """Stored codes: tensors of these dtypes that are not scales themselves."""
    for name, entry in source.entries.items():
        if entry.dtype in dtypes and not _SCALE.fullmatch(name):
            yield name, entry


def read_fp8(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[StoredWeight]:
    """`weight_block_size` of (128, 128) unless config says otherwise; int8 is E2M1 in groups of 32 (DeepSeek-V4)."""
    size = config.get("weight_block_size", (128, 128))
    block = (int(size[0]), int(size[1])) if size else None
    for name, entry in _coded(source, *_FP8, torch.int8):
        free = "weight_block_size" not in config or f"{name}_scale" in source
        yield _fp4(source, name, 32) if entry.dtype == torch.int8 else _weight(source, name, block, free)


def read_fbgemm(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[StoredWeight]:
    """A scale to each output channel: rows of a linear layer, columns of a fused expert [experts, in, out]."""
    for name, entry in _coded(source, *_FP8):
        scale = _scale_of(source, name)
        grid = (*entry.shape[:-2], 1, *entry.shape[-1:])
        if len(entry.shape) == 3 and scale and math.prod(source.entries[scale].shape) == math.prod(grid):
            yield StoredWeight(name, entry.shape, {"codes": name, "scale": scale}, grid, (entry.shape[-2], 1))
        else:
            yield _weight(source, name, None)


def read_mxfp4(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[StoredWeight]:
    """GPT-OSS: `X_blocks` bytes [experts, out, groups, 16] and `X_scales` E8M0 [experts, out, groups] are the fused
    parameter X [experts, in, out], 32 inputs to a group."""
    for name in (name for name in source.names() if name.endswith("_blocks")):
        stem, shape = name.removesuffix("_blocks"), source.entries[name].shape
        scale = f"{stem}_scales"
        found = source.entries[scale].shape if scale in source else None
        if len(shape) != 4 or shape[-1] != 16 or found != shape[:-1]:
            problem = f"of shape {found} does not scale" if found else "is missing, the scale of"
            raise CheckpointError(f"{source.directory}: {scale!r} {problem} {name!r} of shape {shape}")
        parts, logical = {"codes": name, "scale": scale}, (*shape[:2], shape[2] * 32)
        yield StoredWeight(stem, logical, parts, shape[:-1], (1, 32), unpack_e2m1, transposed=True)


def read_modelopt(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[StoredWeight]:
    """NVIDIA ModelOpt: FP8 with a scale to the tensor or row; NVFP4 in groups of 16 with a second, global factor."""
    algorithm = config.get("quant_algo", "FP8")
    if algorithm not in _MODELOPT:
        raise CheckpointError(f"{source.directory}: ModelOpt's {algorithm} is not understood ({', '.join(_MODELOPT)})")
    for name, entry in _coded(source, *_FP8, torch.uint8):
        if entry.dtype != torch.uint8:
            yield _weight(source, name, None)
        elif f"{name}_scale_2" in source:
            yield _fp4(source, name, 16, global_factor=f"{name}_scale_2")


def read_compressed(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[StoredWeight]:
    """compressed-tensors: codes packed (`weight_packed`) or plain (`weight`), shaped by their group of the config."""
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if config.get("transform_config") or sparsity != "dense":
        raise CheckpointError(f"{source.directory}: weights that were rotated or made sparse are not understood")
    shapes = source.read([name for name in source.names() if name.endswith(".weight_shape")])
    for name, entry in _coded(source, *_FP8, torch.int8, torch.int32, torch.uint8):
        layer, _, kind = name.rpartition(".")
        if kind == "weight" or entry.dtype in _FP8:
            yield _weight(source, name, _group_block(_arguments(source, config, layer)))
        elif kind == "weight_packed" and entry.dtype == torch.uint8:
            divisor = f"{layer}.weight_global_scale"
            group = int(_arguments(source, config, layer)["group_size"])
            yield _fp4(source, name, group, **({"global_divisor": divisor} if divisor in source else {}))
        elif kind == "weight_packed":
            yield _packed_ints(source, name, _arguments(source, config, layer), shapes.get(f"{layer}.weight_shape"))


def _arguments(source: Checkpoint, config: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
    """The weight arguments of a layer's config group: by its name, else by a pattern, else by its class."""
    groups = [group for group in config.get("config_groups", {}).values() if isinstance(group, dict)]
    class_name = "Embedding" if "embed" in layer.rpartition(".")[2] else "Linear"
    tests = (
        lambda target: target == layer,
        lambda target: target.startswith("re:") and match(target[3:], layer),
        lambda target: target == class_name,
    )
    for test in tests:
        for group in groups:
            if any(test(target) for target in group.get("targets", ())) and group.get("weights"):
                form = group.get("format") or config.get("format")
                if not _CT_FORMAT.fullmatch(str(form)):
                    raise CheckpointError(f"{source.directory}: compressed-tensors' {form} is not understood")
                return group["weights"]
    raise CheckpointError(f"{source.directory}: {layer!r} is quantized, but by no group of quantization_config")


def _group_block(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    if arguments.get("strategy") == "block":
        size = arguments["block_structure"]
        rows, columns = size.split("x") if isinstance(size, str) else size
        return int(rows), int(columns)
    return (1, int(arguments["group_size"])) if arguments.get("strategy") in ("group", "tensor_group") else None


def _packed_ints(
    source: Checkpoint, codes: str, arguments: Mapping[str, Any], shape: torch.Tensor | None
) -> StoredWeight:
    """int4, int8, … in int32 words; `shape` is the content of the stored `weight_shape`."""
    stem, bits = codes.removesuffix("_packed"), int(arguments["num_bits"])
    logical, found = tuple(map(int, shape.tolist() if shape is not None else ())), source.entries[codes].shape
    if not logical or found != (*logical[:-1], -(-logical[-1] * bits // 32)):
        problem = f"of shape {found} does not hold {logical} of {bits} bits" if logical else f"has no {stem}_shape"
        raise CheckpointError(f"{source.directory}: {codes!r} {problem}")
    parts = {"column_groups": f"{stem}_g_idx"} if f"{stem}_g_idx" in source else {}
    unpack = functools.partial(unpack_ints, bits=bits)
    return _weight(source, codes, _group_block(arguments), shape=logical, unpack=unpack, **parts)


READERS: dict[str, Callable[[Checkpoint, Mapping[str, Any]], Iterable[StoredWeight]]] = {
    "fp8": read_fp8,
    "fbgemm_fp8": read_fbgemm,
    "mxfp4": read_mxfp4,
    "modelopt": read_modelopt,
    "compressed-tensors": read_compressed,
}


def open_checkpoint(
    directory: str | Path,
    quantization_config: Mapping[str, Any] | None,
    dtype: torch.dtype = torch.bfloat16,
    headers_only: bool = False,
) -> Checkpoint | DequantizedCheckpoint:
    """A model folder's tensors as floats; `quantization_config` is config.json's, `dtype` what is dequantized to.

    headers_only: the files may end after their headers; then no tensor can be read.

    Raises:
        CheckpointError: the folder cannot be read, its quantization is not understood or is one that quantizing again
            would only make worse, or a quantized tensor lacks its scale.
    """
    source = Checkpoint(directory, headers_only)
    if not quantization_config:
        bare = next((name for name, _ in _coded(source, *_FP8) if _scale_of(source, name)), None)
        if bare is not None:
            raise CheckpointError(f"{directory}: {bare!r} has a scale, but config.json has no quantization_config")
        return source
    method = str(quantization_config.get("quant_method", "an unknown method"))
    if method in _LOW_BIT:
        flags = (bits for bits in (4, 8) if quantization_config.get(f"load_in_{bits}bit"))
        bits = quantization_config.get("bits") or next(flags, "few")
        problem = f"is quantized already to {bits} bits ({method}); quantizing again would lose quality twice"
        raise CheckpointError(f"{directory} {problem}: give the original")
    if method not in READERS:
        problem = f"is quantized by {method!r}, which is not understood ({', '.join(READERS)} are)"
        raise CheckpointError(f"{directory} {problem}: give the original")
    with reading(f"{directory}: quantization_config of config.json"):
        weights = {weight.name: weight for weight in READERS[method](source, quantization_config)}
    return DequantizedCheckpoint(source, weights, _dropped(source, weights), dtype)
