"""4-bit layers on a CPU in bfloat16: PyTorch's own 4-bit product for few rows, the reference for many.

The product reads four bits per weight, so it wins while a layer is bound by memory (decoding); with many rows
(a prompt) its time grows with every row, and dequantizing once for one matrix product is faster.

The product computes `scale · (code − 8) + offset` with scale and offset = scale · (8 − zero point) rounded to bfloat16,
so it differs from the reference by bfloat16 rounding of the scales; `dequantize` stays exact, from the same codes.
Repacking keeps the codes once: 64 outputs are interleaved per block, which `codes` undoes. The layout belongs to
PyTorch's AVX-512 kernels; where `post_init` finds another one, the layer stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from auto_round.formats.packing import encode
from auto_round.inference.backends import PackedLayer
from auto_round.inference.backends.torch import QuantLinear, needs_grad
from auto_round.logger import logger

MAX_ROWS = 64  # crossover on one Sapphire Rapids core: 57 rows at 2048×2048, 96 at 4096×4096 and 14336×4096
_GROUP_SIZES = (256, 128, 64, 32)  # what the operator takes; larger groups repeat their scale
_BLOCK = 64  # outputs that the operator interleaves


class Int4Linear(QuantLinear):
    """A `QuantLinear` with `qweight` uint8 [out/64, in, 32] after `post_init`; state dicts keep the file layout."""

    backend = "torch_int4"

    def __init__(self, layer: PackedLayer):
        super().__init__(layer)
        self._op_group_size = next(size for size in _GROUP_SIZES if layer.group_size % size == 0)
        self._repacked = False
        self.register_buffer("scales_and_offsets", None, persistent=False)

    def post_init(self) -> None:
        super().post_init()
        if self.g_idx is not None:
            self.backend, self.backend_reason = "torch", "its groups are not of consecutive inputs (act-order)"
            return
        packed = self._repack()
        if packed is None:
            logger.warning("%s: this PyTorch packs 4-bit weights in an unknown layout; using the reference", self.layer)
            self.backend, self.backend_reason = "torch", "the layout of PyTorch's 4-bit operator is unknown here"
            return
        self.qweight, self._repacked = packed, True
        self.scales_and_offsets = self._scales_and_offsets()

    def _repack(self) -> torch.Tensor | None:
        """uint8 [out/64, in, 32], or None if a block does not come back from it unchanged."""
        blocks, inputs = self.out_features // _BLOCK, self.in_features
        packed = torch.empty(blocks, inputs, _BLOCK // 2, dtype=torch.uint8)
        for block in range(blocks):  # block by block: the operator wants its codes as int32
            codes = super().codes(block * _BLOCK, (block + 1) * _BLOCK)
            words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
            packed[block] = words.view(inputs, _BLOCK // 2)
            if not torch.equal(_unpack(packed[block : block + 1]), codes):
                return None
        return packed

    def _scales_and_offsets(self) -> torch.Tensor:
        """bfloat16 [groups of the operator, out, 2]."""
        scales = self.scales.float()
        zeros = self._zeros()
        offsets = scales * (8 - (zeros.squeeze(-1).t() if isinstance(zeros, torch.Tensor) else zeros))
        pairs = torch.stack((scales, offsets), dim=-1).to(torch.bfloat16)
        return pairs.repeat_interleave(self.layer.group_size // self._op_group_size, dim=0).contiguous()

    def codes(self, start: int, stop: int) -> torch.Tensor:
        if not self._repacked:
            return super().codes(start, stop)
        first, last = start // _BLOCK, -(-stop // _BLOCK)
        return _unpack(self.qweight[first:last])[start - first * _BLOCK : stop - first * _BLOCK]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        if not self._repacked or not 0 < rows <= MAX_ROWS or x.dtype != torch.bfloat16 or needs_grad(x):
            return super().forward(x)
        flat = x.reshape(rows, self.in_features)
        weight = self.qweight.view(self.out_features, self.in_features // 2)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, weight, self._op_group_size, self.scales_and_offsets)
        if self.bias is not None:
            y += self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._repacked:
            layer = self.layer
            zeros = torch.zeros(layer.out_features, layer.groups, dtype=torch.uint8)
            codes = self.codes(0, layer.out_features)
            destination[prefix + "qweight"] = encode(layer.packing, codes, zeros, layer.bits)["qweight"]


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks, in, 32] → codes [blocks·64, in]: byte i of an input holds outputs i (low) and i + 32 (high)."""
    blocks, inputs, half = packed.shape
    rows = packed.transpose(1, 2).contiguous()
    codes = torch.empty(blocks, 2, half, inputs, dtype=torch.uint8)
    torch.bitwise_and(rows, 15, out=codes[:, 0])
    torch.bitwise_right_shift(rows, 4, out=codes[:, 1])
    return codes.view(-1, inputs)
