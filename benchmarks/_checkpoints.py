"""Saved checkpoints of any quantizer, decoded into dense copies of the original model.

Nothing here is shared with the quantizers under test: packed integers, 4-bit floats and GGUF files are read by their
published layouts. Where a scheme rounds the inputs of its layers too, so does the decoded model, by one rule for all.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, pad
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

Record = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Rounding = Callable[[torch.Tensor], torch.Tensor]

WORD_BITS = 32
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MX_BIAS, MX_TOP, MX_ROUND_UP = 127, 3, 0.875
PACKED_SUFFIXES = frozenset(
    {"qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"}
    | {"weight_global_scale", "input_global_scale"}
)
EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(gate|up|down)_proj")


# ---------------------------------------------------------------------------------------------------------------------
# Integers
# ---------------------------------------------------------------------------------------------------------------------


def unpack_codes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Decode ``count`` unsigned codes from the little-endian bit stream in each column of int32 ``words``."""
    blocks = -(-count // WORD_BITS)  # 32 codes always fill exactly ``bits`` words
    words = words.to(torch.int64) & 0xFFFFFFFF
    if words.shape[0] < blocks * bits:
        words = pad(words, (0, 0, 0, blocks * bits - words.shape[0]))
    stream = words[: blocks * bits].reshape(blocks, bits, -1)
    codes = torch.empty(blocks, WORD_BITS, stream.shape[-1], dtype=torch.int64)
    for position in range(WORD_BITS):
        word, shift = divmod(position * bits, WORD_BITS)
        value = stream[:, word] >> shift
        if shift + bits > WORD_BITS:
            value = value | (stream[:, word + 1] << (WORD_BITS - shift))
        codes[:, position] = value & ((1 << bits) - 1)
    return codes.reshape(blocks * WORD_BITS, -1)[:count]


def layer_setting(config: Record, name: str, key: str) -> int:
    """The value of ``key`` for layer ``name``: its own in ``extra_config`` (exact or pattern), else the general one."""
    extra = config.get("extra_config") or {}
    entry = extra.get(name)
    if entry is None:
        entry = next((value for pattern, value in extra.items() if re.fullmatch(pattern, name)), {})
    value = entry.get(key)
    return int(config[key] if value is None else value)


def stored_zero_offset(config: Record) -> int:
    """What has to be added to a stored zero point: 1 for the first GPTQ layout, 0 where it is stored as it is."""
    packing = str(config.get("packing_format", ""))
    method = config.get("quant_method")
    if "awq" in packing or method == "awq":
        raise ValueError("the AWQ layout is not read by this evaluation")
    if method == "gptq":
        return int(config.get("checkpoint_format", "gptq") != "gptq_v2")
    return int("gptq" in packing and "gptqmodel" not in packing)


def group_index(tensors: Tensors, name: str, config: Record, columns: int) -> torch.Tensor:
    """The group of every input column: the stored index, else runs whose length follows from the rows of scales."""
    if f"{name}.g_idx" in tensors:
        return tensors[f"{name}.g_idx"].long()
    rows = tensors[f"{name}.scales"].shape[0]
    size = layer_setting(config, name, "group_size")
    if size <= 0 or -(-columns // size) != rows:
        size = -(-columns // rows)
    if -(-columns // size) != rows:
        raise ValueError(f"{name}: {rows} rows of scales do not divide {columns} columns into groups")
    return torch.arange(columns) // size


def decode_gptq(tensors: Tensors, name: str, config: Record, shape: tuple[int, ...]) -> torch.Tensor:
    """The fp32 weight of shape [out, in] that a layer in the GPTQ layout stands for."""
    out_features, in_features = shape
    qweight = tensors[f"{name}.qweight"]
    bits = layer_setting(config, name, "bits")
    if qweight.shape[0] * WORD_BITS != in_features * bits or qweight.shape[1] != out_features:
        raise ValueError(f"{name}: qweight {tuple(qweight.shape)} is not a {bits}-bit packing of {tuple(shape)}")
    codes = unpack_codes(qweight, bits, in_features)
    zeros = unpack_codes(tensors[f"{name}.qzeros"].t(), bits, out_features).t()
    zeros = (zeros + stored_zero_offset(config)) & ((1 << bits) - 1)
    groups = group_index(tensors, name, config, in_features)
    scales = tensors[f"{name}.scales"].float()
    return ((codes - zeros[groups]).float() * scales[groups]).t()


def unpack_rows(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """``count`` codes of each row of int32 words that hold as many whole codes as fit, the lowest bits first."""
    shifts = torch.arange(WORD_BITS // bits) * bits
    codes = (words.to(torch.int64)[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[:, :count]


def decode_compressed(tensors: Tensors, name: str, bits: int) -> torch.Tensor:
    """The fp32 weight of shape [out, in] of a layer in compressed-tensors' layout ``pack-quantized``."""
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    codes = unpack_rows(tensors[f"{name}.weight_packed"], bits, columns)
    scales = tensors[f"{name}.weight_scale"].float()
    zeros = torch.full(scales.shape, 1 << (bits - 1))
    if f"{name}.weight_zero_point" in tensors:
        zeros = unpack_rows(tensors[f"{name}.weight_zero_point"].t(), bits, rows).t()
    groups = torch.arange(columns) // (columns // scales.shape[1])
    return (codes - zeros[:, groups]).float() * scales[:, groups]


# ---------------------------------------------------------------------------------------------------------------------
# 4-bit floats
# ---------------------------------------------------------------------------------------------------------------------


def decode_floats(tensors: Tensors, name: str) -> torch.Tensor:
    """The fp32 weight of a layer of 4-bit floats: NVFP4 where it has a global scale, else MXFP4."""
    packed = tensors[f"{name}.weight_packed"].to(torch.int64)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    values = MAGNITUDES[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    scale = tensors[f"{name}.weight_scale"]
    if f"{name}.weight_global_scale" in tensors:
        scale = scale.float() / tensors[f"{name}.weight_global_scale"].float()
    else:
        scale = torch.exp2(scale.to(torch.int32) - MX_BIAS)
    return values * scale.repeat_interleave(values.shape[-1] // scale.shape[-1], dim=-1)


def nearest_float(x: torch.Tensor) -> torch.Tensor:
    """Values rounded to 4-bit floats; of two at the same distance the one with the even code."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((x / step).round_() * step).clamp_(-MAGNITUDES[-1], MAGNITUDES[-1])


def round_mx(x: torch.Tensor) -> torch.Tensor:
    """Inputs [..., in] in MXFP4, whose scales are rounded up from 7/8 of the next power of two as engines do."""
    groups = x.unflatten(-1, (-1, 32))
    mantissa, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True))
    scale = torch.exp2((exponent - MX_TOP + (mantissa >= MX_ROUND_UP)).clamp(-126, 127))
    return (nearest_float(groups / scale) * scale).flatten(-2)


def round_nv(x: torch.Tensor, overall: torch.Tensor) -> torch.Tensor:
    """Inputs [..., in] in NVFP4 with a calibrated global scale."""
    groups = x.unflatten(-1, (-1, 16))
    block = groups.abs().amax(-1, keepdim=True) / MAGNITUDES[-1] * overall
    scale = block.clamp(max=448).to(torch.float8_e4m3fn).float() / overall
    safe = torch.where(scale == 0, 1.0, scale)
    return (nearest_float(groups / safe) * scale).flatten(-2)


class RoundedInputs(TorchFunctionMode):
    """While entered, products with certain weights round their inputs first; the key is where the weight begins."""

    def __init__(self, roundings: dict[int, Rounding]):
        super().__init__()
        self.roundings = roundings

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Pass every call on, with rounded inputs where it is such a product."""
        if func is linear and (rounding := self.roundings.get(args[1].data_ptr())):
            args = (rounding(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


class RoundingModel(torch.nn.Module):
    """A model some of whose products round their inputs."""

    def __init__(self, model: torch.nn.Module, roundings: dict[int, Rounding]):
        super().__init__()
        self.model, self.roundings = model, roundings

    def forward(self, **inputs: torch.Tensor) -> Any:
        with RoundedInputs(self.roundings):
            return self.model(**inputs)


def input_roundings(model: torch.nn.Module, tensors: Tensors, config: Record) -> dict[int, Rounding]:
    """How the inputs of each quantized product are rounded, by the address of its weight; empty if they are not."""
    if not str(config.get("act_data_type", "")).startswith(("mx_fp", "nv_fp")) or config.get("act_bits") != 4:
        return {}
    found: dict[int, Rounding] = {}
    for name in layers_of(tensors, "weight_packed"):
        overall = tensors.get(f"{name}.input_global_scale")
        rounding = round_mx if overall is None else partial(round_nv, overall=overall.float())
        found.setdefault(weight_of(model, name).data_ptr(), rounding)  # of gate and up in one, the gate's scale counts
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def load_original(folder: Path) -> torch.nn.Module:
    """The model of a folder in fp32, whose experts are multiplied one by one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if getattr(model.config, "num_experts", None):
        model.set_experts_implementation("eager")
    return model


def weight_of(model: torch.nn.Module, name: str) -> torch.Tensor:
    """The weight [out, in] of a layer of the checkpoint; of an expert, its slice of the model's stacked tensor."""
    if (match := EXPERT.fullmatch(name)) is None:
        return model.get_parameter(f"{name}.weight")
    experts = model.get_submodule(match[1])
    index, kind = int(match[2]), match[3]
    if kind == "down":
        return experts.down_proj[index]
    gate, up = experts.gate_up_proj[index].chunk(2)
    return gate if kind == "gate" else up


def layers_of(tensors: Tensors, suffix: str) -> list[str]:
    return [key.removesuffix(f".{suffix}") for key in tensors if key.endswith(f".{suffix}")]


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of the safetensors files in ``folder``."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def original_shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a folder, from the headers."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (the handle cannot be iterated over)
                yield name, tuple(opened.get_slice(name).get_shape())


def compressed_bits(config: Record) -> int:
    """Bits of the one group of weights that a configuration of compressed-tensors describes."""
    (group,) = config["config_groups"].values()
    return int(group["weights"]["num_bits"])


def dense_tensors(tensors: Tensors, config: Record, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """The original's tensors by name: packed layers decoded, the others as they were saved."""
    dense = {key: value for key, value in tensors.items() if key.rsplit(".", 1)[-1] not in PACKED_SUFFIXES}
    for name in layers_of(tensors, "qweight"):
        dense[f"{name}.weight"] = decode_gptq(tensors, name, config, shapes[f"{name}.weight"])
    for name in layers_of(tensors, "weight_packed"):
        integers = f"{name}.weight_shape" in tensors
        weight = decode_compressed(tensors, name, compressed_bits(config)) if integers else decode_floats(tensors, name)
        dense[f"{name}.weight"] = weight
    return dense


def from_tensors(dense: Tensors, original: Path) -> torch.nn.Module:
    """The original model in fp32 with other weights; each must be there, and no other."""
    shapes = dict(original_shapes(original))
    if "lm_head.weight" not in shapes:  # tied to the embedding, and some save it all the same
        dense.pop("lm_head.weight", None)
    if set(dense) != set(shapes):
        raise ValueError(f"not saved: {sorted(set(shapes) - set(dense))}; unknown: {sorted(set(dense) - set(shapes))}")
    with tempfile.TemporaryDirectory() as name:
        shutil.copyfile(original / "config.json", Path(name) / "config.json")
        save_file({key: value.float().contiguous() for key, value in dense.items()}, Path(name) / "model.safetensors")
        return load_original(Path(name))


def load_decoded(folder: Path, original: Path) -> torch.nn.Module:
    """An fp32 copy of the original that holds, and computes with, what is saved in ``folder``."""
    if files := sorted(folder.glob("*.gguf")):
        from _gguf_files import gguf_tensors

        return from_tensors(gguf_tensors(files[0], original), original)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if config is None:
        return load_original(folder)
    tensors = read_tensors(folder)
    if not layers_of(tensors, "qweight") + layers_of(tensors, "weight_packed"):
        raise ValueError("no packed layer found")
    model = from_tensors(dense_tensors(tensors, config, dict(original_shapes(original))), original)
    roundings = input_roundings(model, tensors, config)
    return RoundingModel(model, roundings) if roundings else model
