"""llama.cpp's block structs: pure functions between a quantized tensor and the bytes that a GGUF file holds for it.

A row is a chain of structs, each for 32 or 256 weights. `BLOCKS` lists the members of every struct in their order (as
ggml-common.h declares them), and one loop over that list both packs and unpacks, so a type is a line of data. Rows go
through in chunks that stay in the cache. Numbers are little-endian, as the hosts PyTorch supports are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from auto_round.data_type.base import QuantizedTensor
from auto_round.schemes import GGUF_TYPES, TensorSpec

CHUNK = 1 << 18  # weights handled at once


@dataclass(frozen=True)
class Bits:
    """Bits `shift` … `shift + width - 1` of the codes. Codes `run` apart share a byte, the first one lowest in it."""

    shift: int
    width: int
    run: int


@dataclass(frozen=True)
class Block:
    """A struct for `weights` weights: its members in order, each `Bits` of the codes or the name of other contents."""

    weights: int
    members: tuple[Bits | str, ...]

    def sizes(self) -> list[int]:
        """Bytes of each member."""
        return [
            self.weights * member.width // 8 if isinstance(member, Bits) else _BYTES[member] for member in self.members
        ]


# Names of members: half-precision numbers, and how the scales of a super-block are laid out.
_BYTES = {"d": 2, "dmin": 2, "min": 2, "nibbles": 16, "pairs of 6": 12, "split 6": 12, "int8": 16}

BLOCKS: dict[str, Block] = {
    "Q4_0": Block(32, ("d", Bits(0, 4, 16))),
    "Q4_1": Block(32, ("d", "min", Bits(0, 4, 16))),
    "Q5_0": Block(32, ("d", Bits(4, 1, 1), Bits(0, 4, 16))),
    "Q5_1": Block(32, ("d", "min", Bits(4, 1, 1), Bits(0, 4, 16))),
    "Q8_0": Block(32, ("d", Bits(0, 8, 32))),
    "Q2_K": Block(256, ("nibbles", Bits(0, 2, 32), "d", "dmin")),
    "Q3_K": Block(256, (Bits(2, 1, 32), Bits(0, 2, 32), "split 6", "d")),
    "Q4_K": Block(256, ("d", "dmin", "pairs of 6", Bits(0, 4, 32))),
    "Q5_K": Block(256, ("d", "dmin", "pairs of 6", Bits(4, 1, 32), Bits(0, 4, 32))),
    "Q6_K": Block(256, (Bits(0, 4, 64), Bits(4, 2, 32), "int8", "d")),
}

_SPECS: dict[str, TensorSpec] = {kind: scheme.weight for kind, scheme in GGUF_TYPES.items()}


def gguf_type(spec: TensorSpec) -> str:
    """The name of llama.cpp's tensor type that holds these numbers, such as "Q4_K".

    Raises:
        ValueError: there is none.
    """
    found = next((kind for kind, known in _SPECS.items() if known == spec), None)
    if found is None:
        raise ValueError(
            f"llama.cpp has no tensor type for {spec.data_type} of {spec.bits} bits in groups of {spec.group_size} "
            f"({'symmetric' if spec.sym else 'asymmetric'}): start from one of GGUF:{', GGUF:'.join(_SPECS)}"
        )
    return found


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of `columns` weights.

    Raises:
        ValueError: the row is no whole number of blocks.
    """
    block = BLOCKS[kind]
    if columns % block.weights:
        raise ValueError(f"{kind} stores weights in blocks of {block.weights}, and {columns} inputs are no multiple")
    return columns // block.weights * sum(block.sizes())


def pack(tensor: QuantizedTensor) -> torch.Tensor:
    """uint8 [out, bytes per row]: the tensor's bits as a GGUF file stores them. Rounds nothing."""
    kind = gguf_type(tensor.spec)
    rows, columns = tensor.codes.shape
    packed = torch.empty(rows, row_bytes(kind, columns), dtype=torch.uint8, device=tensor.codes.device)
    step = max(1, CHUNK // columns)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        extra = {name: values[part] for name, values in tensor.extra.items()}
        _pack_rows(kind, tensor.codes[part], tensor.scale[part], extra, packed[part])
    return packed


def unpack(packed: torch.Tensor, kind: str, columns: int) -> QuantizedTensor:
    """The inverse of `pack`: uint8 [out, bytes per row] of type `kind` back to [out, columns] codes and their scales.

    Raises:
        ValueError: rows of another length.
    """
    wanted = row_bytes(kind, columns)
    if packed.dim() != 2 or packed.shape[1] != wanted or packed.dtype != torch.uint8:
        raise ValueError(
            f"rows of {columns} weights of type {kind} are uint8 [out, {wanted}], not {packed.dtype} "
            f"{tuple(packed.shape)}: the file is cut off, or its header names another type"
        )
    spec, block, rows = _SPECS[kind], BLOCKS[kind], packed.shape[0]
    structs = packed.view(rows, columns // block.weights, -1)
    codes = torch.zeros(rows, columns, dtype=torch.uint8, device=packed.device)
    found: dict[str, torch.Tensor] = {}
    for member, data in zip(block.members, structs.split(block.sizes(), dim=-1), strict=True):
        if isinstance(member, str):
            found.update(_unpack_member(member, data))
    step = max(1, CHUNK // columns)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        for member, data in zip(block.members, structs[part].split(block.sizes(), dim=-1), strict=True):
            if isinstance(member, Bits):
                _spread(data, member, codes[part])
    return QuantizedTensor(codes, found.pop("d"), None, spec, found)


def _pack_rows(kind: str, codes: torch.Tensor, scale: torch.Tensor, extra: dict, packed: torch.Tensor) -> None:
    """Fill `packed` [rows, bytes] from codes [rows, in] and scales of the same rows."""
    block, bits = BLOCKS[kind], _SPECS[kind].bits
    structs = packed.view(len(codes), scale.shape[1], -1)
    values = {"d": scale, **extra}
    for member, place in zip(block.members, structs.split(block.sizes(), dim=-1), strict=True):
        data = _merge(codes, member, bits) if isinstance(member, Bits) else _pack_member(member, values)
        place.copy_(data.view(place.shape))


def _merge(codes: torch.Tensor, member: Bits, bits: int) -> torch.Tensor:
    """The bytes of one member: fields of 8/width codes side by side."""
    if member.width == 8:
        return codes ^ 0x80  # int8 in the struct, and a code q is stored as q + 128 here
    field = codes >> member.shift if member.shift else codes
    if member.shift + member.width < bits:
        field = field & ((1 << member.width) - 1)
    planes = field.reshape(-1, 8 // member.width, member.run)
    merged = planes[:, 0].clone(memory_format=torch.contiguous_format)
    for slot in range(1, planes.shape[1]):
        merged.add_(planes[:, slot], alpha=1 << (slot * member.width))
    return merged


def _spread(data: torch.Tensor, member: Bits, codes: torch.Tensor) -> None:
    """Add the fields in a member's bytes to `codes`: `_merge` backwards."""
    if member.width == 8:
        codes.copy_((data ^ 0x80).reshape(codes.shape))
        return
    planes = codes.view(-1, 8 // member.width, member.run)
    merged = data.reshape(-1, member.run)
    for slot in range(planes.shape[1]):
        field = merged >> (slot * member.width) if slot else merged
        planes[:, slot].add_(field & ((1 << member.width) - 1), alpha=1 << member.shift)


def _pack_member(member: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Bytes of a member that is not codes; `values` are float16 numbers and codes of scales, by name."""
    if member in values:
        return values[member].contiguous().view(torch.uint8)
    scales = values["scales"]
    if member == "int8":
        return scales.contiguous().view(torch.uint8)
    if member == "nibbles":
        return scales | (values["mins"] << 4)
    return _pairs_of_6(scales, values["mins"]) if member == "pairs of 6" else _split_6(scales)


def _unpack_member(member: str, data: torch.Tensor) -> dict[str, torch.Tensor]:
    """`_pack_member` backwards: data uint8 [rows, blocks, bytes]."""
    rows = data.shape[0]
    if _BYTES[member] == 2:
        return {member: data.contiguous().view(torch.float16).view(rows, -1)}
    if member == "int8":
        return {"scales": data.contiguous().view(torch.int8).view(rows, -1)}
    if member == "nibbles":
        return {"scales": (data & 15).reshape(rows, -1), "mins": (data >> 4).reshape(rows, -1)}
    if member == "split 6":
        return {"scales": _from_split_6(data).view(rows, -1)}
    scales, mins = _from_pairs_of_6(data)
    return {"scales": scales.reshape(rows, -1), "mins": mins.reshape(rows, -1)}


def _pairs_of_6(scales: torch.Tensor, mins: torch.Tensor) -> torch.Tensor:
    """Eight scales and eight minima of 6 bits in 12 bytes.

    Bytes 0-3 and 4-7 hold the first four of each; bytes 8-11 the low nibbles of the last four (scale below minimum),
    whose upper two bits lie above the first four's.
    """
    s, m = scales.reshape(-1, 2, 4), mins.reshape(-1, 2, 4)
    upper = [x[:, 0] | ((x[:, 1] >> 4) << 6) for x in (s, m)]
    return torch.stack([*upper, (s[:, 1] & 15) | ((m[:, 1] & 15) << 4)], dim=1)


def _from_pairs_of_6(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`_pairs_of_6` backwards."""
    s, m, low = data.reshape(-1, 3, 4).unbind(1)
    scales = torch.stack([s & 63, (low & 15) | ((s >> 6) << 4)], dim=1)
    mins = torch.stack([m & 63, (low >> 4) | ((m >> 6) << 4)], dim=1)
    return scales, mins


def _split_6(scales: torch.Tensor) -> torch.Tensor:
    """Sixteen signed scales of 6 bits, plus 32, in 12 bytes: nibbles eight apart, then the upper bits four apart."""
    stored = (scales + 32).contiguous().view(torch.uint8)
    low = _merge(stored, Bits(0, 4, 8), 6).view(-1, 8)
    return torch.cat([low, _merge(stored, Bits(4, 2, 4), 6).view(-1, 4)], dim=1)


def _from_split_6(data: torch.Tensor) -> torch.Tensor:
    """`_split_6` backwards: int8."""
    stored = torch.zeros(*data.shape[:2], 16, dtype=torch.uint8, device=data.device)
    _spread(data[..., :8], Bits(0, 4, 8), stored)
    _spread(data[..., 8:], Bits(4, 2, 4), stored)
    return stored.view(torch.int8) - 32
