"""The kernels of `auto-round-lib` on a CPU, for widths and dtypes that PyTorch's 4-bit product does not take.

Only their float32 computation is used: it agrees with the reference to float32 rounding. Their own choice ("auto")
quantizes activations to 8 bits on processors with such instructions, several times faster at errors near 1 %.

The kernels' blob is kept beside the packed codes, which many rows, gradients and saving use: about twice the memory of
the codes alone. Many rows (a prompt) go through the reference, whose one matrix product is faster then.
"""

from __future__ import annotations

import importlib

import torch

from auto_round.inference.backends import PackedLayer
from auto_round.inference.backends.torch import QuantLinear, needs_grad

MAX_ROWS = 128  # measured crossover: about 200 rows at 4096×4096 on one Sapphire Rapids core


class ArkLinear(QuantLinear):
    """A `QuantLinear` with the kernels' weight, int8 [bytes], beside it."""

    backend = "auto_round_kernel"

    def __init__(self, layer: PackedLayer):
        super().__init__(layer)
        self.register_buffer("blob", None, persistent=False)

    def post_init(self) -> None:
        super().post_init()
        if self.g_idx is not None:
            self.backend, self.backend_reason = "torch", "its groups are not of consecutive inputs (act-order)"
            return
        layer, middle = self.layer, 1 << (self.layer.bits - 1)
        self._kernels = importlib.import_module("auto_round_kernel")
        self._symmetric = self._constant_zero == middle
        zeros = self._zeros()
        if not isinstance(zeros, torch.Tensor):
            zeros = torch.full_like(self.scales.t(), zeros, dtype=torch.float32)
        # Signed codes and zero points, [in, out] and [groups, out].
        codes = (self.codes(0, layer.out_features).to(torch.int16) - middle).to(torch.int8)
        zeros = (zeros.view(layer.out_features, layer.groups) - middle).to(torch.int8)
        self.blob = self._kernels.repack_quantized_weight(
            codes.t().contiguous(), self.scales.float(), zeros.t().contiguous(), *self._types()
        )

    def _types(self) -> tuple[int, str, str, str, bool]:
        """Group size, then the dtypes of the computation, the weight and the scales, then whether zeros are used."""
        return self.layer.group_size, "fp32", f"int{self.layer.bits}", "fp32", not self._symmetric

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        if not 0 < rows <= MAX_ROWS or needs_grad(x) or self.blob is None:
            return super().forward(x)
        flat = x.reshape(rows, self.in_features).float().contiguous()
        bias = torch.empty(0) if self.bias is None else self.bias.float()
        y = self._kernels.woqgemm(flat, self.blob, bias, self.out_features, self.in_features, *self._types())
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)
