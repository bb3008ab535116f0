"""Bit layouts of packed integer codes: pure functions from uint8 codes to int32 words and back.

Two layouts exist. The *bit stream* puts code i of a row at bits [i·b, (i+1)·b) of a little-endian stream of int32
words, so 32 codes fill exactly b words and widths that do not divide 32 straddle word borders. The *AWQ* layout is
4-bit only: eight neighbouring output channels share a word in the order `AWQ_ORDER`.

Eight codes are held in one int64 and squeezed together in three masked shifts ("SIMD within a register"), so a layer
costs a handful of passes over an eighth of its elements and all widths share one path. Rows go through in chunks that
stay in the cache, which also bounds the temporary memory. Words are little-endian, as the hosts PyTorch supports are.
"""

from __future__ import annotations

import torch

GROUP = 32  # codes that fill a whole number of int32 words for every width
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output channel (of eight) held by nibble slot 0, 1, …
_CHUNK = 1 << 19  # codes handled at once: the temporaries stay in the second-level cache


def pack_bits(codes: torch.Tensor, bits: int, dim: int = -1) -> torch.Tensor:
    """Pack uint8 codes below 2^bits into an int32 bit stream along `dim`.

    A dimension of n codes (a multiple of 32) becomes n·bits/32 words; other dimensions stay.
    """
    _check(bits, codes, torch.uint8)
    if codes.shape[dim] % GROUP:
        raise ValueError(f"{codes.shape[dim]} codes along dimension {dim} are not a multiple of {GROUP}")
    moved = codes.movedim(dim, -1).contiguous()
    octets = _aligned(moved).view(-1, 8)
    stream = torch.empty(octets.shape[0], bits, dtype=torch.uint8, device=codes.device)
    for start in range(0, octets.shape[0], _CHUNK // 8):
        part = octets[start : start + _CHUNK // 8]
        stream[start : start + _CHUNK // 8] = part if bits == 8 else _squeeze(part.view(torch.int64), bits)
    words = stream.view(-1).view(torch.int32).view(*moved.shape[:-1], -1)
    return words.movedim(-1, dim).contiguous()


def unpack_bits(words: torch.Tensor, bits: int, dim: int = -1) -> torch.Tensor:
    """The inverse of `pack_bits`: int32 words along `dim` to uint8 codes (32 for every `bits` words)."""
    _check(bits, words, torch.int32)
    if words.shape[dim] % bits:
        raise ValueError(f"{words.shape[dim]} words along dimension {dim} are not a multiple of {bits}")
    moved = words.movedim(dim, -1).contiguous()
    stream = moved.view(-1).view(torch.uint8).view(-1, bits)
    octets = torch.empty(stream.shape[0], 8, dtype=torch.uint8, device=words.device)
    for start in range(0, stream.shape[0], _CHUNK // 8):
        part = stream[start : start + _CHUNK // 8]
        octets[start : start + _CHUNK // 8] = part if bits == 8 else _spread(part, bits)
    codes = octets.view(*moved.shape[:-1], -1)
    return codes.movedim(-1, dim).contiguous()


def pack_gptq(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [out, in] → int32 [in·bits/32, out]: the bit stream runs along the inputs, a column per output."""
    return pack_bits(codes, bits).t().contiguous()


def unpack_gptq(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [in·bits/32, out] → uint8 codes [out, in]."""
    return unpack_bits(words.t(), bits)


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """4-bit uint8 codes [out, in] → int32 [in, out/8]: slot k of a word holds output `AWQ_ORDER[k]` of eight."""
    rows, columns = codes.shape
    if rows % 8:
        raise ValueError(f"the AWQ layout needs a multiple of 8 outputs, not {rows}")
    eights = codes.view(rows // 8, 8, columns)
    # Pairs of neighbouring slots make a byte; only the half-sized result is transposed.
    slots = [eights[:, channel] for channel in AWQ_ORDER]
    octets = torch.stack([slots[k] | (slots[k + 1] << 4) for k in range(0, 8, 2)], dim=1)
    return octets.view(rows // 2, columns).t().contiguous().view(-1).view(torch.int32).view(columns, rows // 8)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """int32 [in, out/8] → 4-bit uint8 codes [out, in]."""
    columns, eighths = words.shape
    octets = words.reshape(-1).view(torch.uint8).view(columns, -1).t().contiguous().view(eighths, 4, columns)
    codes = torch.empty(eighths, 8, columns, dtype=torch.uint8, device=words.device)
    for slot, channel in enumerate(AWQ_ORDER):
        octet = octets[:, slot // 2]
        codes[:, channel] = octet >> 4 if slot % 2 else octet & 15
    return codes.view(eighths * 8, columns)


def _check(bits: int, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits cannot be packed: widths are 2 to 8")
    if tensor.dtype != dtype:
        raise ValueError(f"expected {dtype}, not {tensor.dtype}")


def _aligned(codes: torch.Tensor) -> torch.Tensor:
    """The same contiguous bytes at an offset that can be viewed as int64."""
    return codes if codes.storage_offset() % 8 == 0 else codes.clone()


def _steps(bits: int) -> list[tuple[int, int, int]]:
    """(mask of the lower half, mask of the upper half, shift) per merge: 8 → 16 → 32 → 64-bit lanes.

    A lane of `width` bits holds its codes in the lowest bits; merging moves the upper half's codes next to the
    lower half's. The masks name where codes are, so stray bits above a code are dropped.
    """
    steps = []
    for width, count in ((8, 1), (16, 2), (32, 4)):
        field = (1 << (bits * count)) - 1
        low = sum(field << start for start in range(0, 64, 2 * width))
        steps.append((low, low << width, width - bits * count))
    return steps


def _squeeze(lanes: torch.Tensor, bits: int) -> torch.Tensor:
    """int64 [n, 1], a code per byte → uint8 [n, bits], the codes side by side. Values stay below 2^63 for bits < 8."""
    for low, high, shift in _steps(bits):
        lanes = (lanes & low) | ((lanes & high) >> shift)
    return lanes.view(torch.uint8)[:, :bits]


def _spread(stream: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [n, bits] → uint8 [n, 8], a code per byte: `_squeeze` backwards.

    Widths 2 and 4 keep whole codes in each byte and spread it inside a lane just wide enough, several times faster.
    """
    if bits == 4:
        pairs = stream.to(torch.int16)
        return ((pairs | (pairs << 4)) & 0x0F0F).view(torch.uint8).view(-1, 8)
    if bits == 2:
        fours = stream.to(torch.int32)
        fours = (fours | (fours << 12)) & 0x000F000F
        return ((fours | (fours << 6)) & 0x03030303).view(torch.uint8).view(-1, 8)
    padded = torch.zeros(stream.shape[0], 8, dtype=torch.uint8, device=stream.device)
    padded[:, :bits] = stream
    lanes = padded.view(torch.int64)
    for low, high, shift in reversed(_steps(bits)):
        lanes = (lanes & low) | ((lanes << shift) & high)
    return lanes.view(torch.uint8)


# Packings: how codes and zero points of a layer are stored. "gptq" runs the bit stream along the inputs; GPTQ's first
# version stores zero points one too low (`zero_shift`), so a zero point of 0 has no representation in it.
AUTO_GPTQ, AUTO_AWQ = "auto_round:auto_gptq", "auto_round:auto_awq"
PLAIN, GPTQMODEL = "auto_round", "auto_round:gptqmodel"
PACKINGS: dict[str, tuple[str, int]] = {
    AUTO_GPTQ: ("gptq", 1),
    PLAIN: ("gptq", 0),
    GPTQMODEL: ("gptq", 0),
    AUTO_AWQ: ("awq", 0),
}
PACKING_ALIASES = {
    "auto": AUTO_GPTQ,
    "auto_round:gptq": AUTO_GPTQ,
    "auto_round:awq": AUTO_AWQ,
}


def normalize_packing(name: str) -> str:
    """The packing that a `packing_format` string means. Raises ValueError listing the known ones."""
    found = PACKING_ALIASES.get(name, name)
    if found not in PACKINGS:
        raise ValueError(f"unknown packing format {name!r}; known: {', '.join([*PACKINGS, *PACKING_ALIASES])}")
    return found


def packed_shapes(packing: str, out: int, inputs: int, groups: int, bits: int) -> dict[str, tuple[int, ...]]:
    """Shapes of `qweight`, `qzeros` (int32) and `scales` (float16) of a layer [out, in] with `groups` per row."""
    if PACKINGS[packing][0] == "awq":
        return {"qweight": (inputs, out // 8), "qzeros": (groups, out // 8), "scales": (groups, out)}
    return {
        "qweight": (inputs * bits // 32, out),
        "qzeros": (groups, out * bits // 32),
        "scales": (groups, out),
    }


def encode(packing: str, codes: torch.Tensor, zeros: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """uint8 codes [out, in] and zero points [out, groups] → `qweight` and `qzeros` (see `packed_shapes`)."""
    layout, zero_shift = PACKINGS[packing]
    if layout == "awq":
        return {"qweight": pack_awq(codes), "qzeros": pack_awq(zeros)}
    stored = (zeros - zero_shift).t().contiguous()
    return {"qweight": pack_gptq(codes, bits), "qzeros": pack_bits(stored, bits)}


def decode_codes(packing: str, qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [out, in] from `qweight`."""
    return unpack_awq(qweight) if PACKINGS[packing][0] == "awq" else unpack_gptq(qweight, bits)


def decode_zeros(packing: str, qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points int16 [out, groups] from `qzeros`: wider than a code, as a stored 255 means 256 in GPTQ's layout."""
    layout, zero_shift = PACKINGS[packing]
    stored = unpack_awq(qzeros) if layout == "awq" else unpack_bits(qzeros, bits).t().contiguous()
    return stored.to(torch.int16) + zero_shift
