"""Reads the integer layouts of GPTQ and AWQ with NumPy, from their description; it shares no code with the writers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

AWQ_SLOTS = (0, 4, 1, 5, 2, 6, 3, 7)  # slot of each output channel within a group of eight


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
    """float32 [out, in] weight of a packed layer (`qweight`, `qzeros`, `scales`, perhaps `g_idx`)."""
    weight, zeros = tensors["qweight"].numpy(), tensors["qzeros"].numpy()
    if packing.endswith("awq"):
        codes, zero = awq_fields(weight).T, awq_fields(zeros).T  # [in, out], [groups, out]
    else:
        codes, zero = bit_fields(weight, bits), bit_fields(zeros.T, bits).T
    zero = zero.astype(np.float32) + (1.0 if packing.endswith("auto_gptq") else 0.0)
    scales = tensors["scales"].float()  # [groups, out]
    columns, rows = codes.shape
    groups = tensors.get("g_idx", torch.arange(columns) // (columns // len(scales))).long()
    if (groups.diff() < 0).any():
        return (torch.from_numpy(codes).float().sub_(torch.from_numpy(zero)[groups])).mul_(scales[groups]).t()
    centred = torch.from_numpy(codes).view(len(scales), -1, rows).float().sub_(torch.from_numpy(zero)[:, None, :])
    return centred.mul_(scales[:, None, :]).view(columns, rows).t()
