"""The reference backend: dequantize, then `F.linear`. Every width, packing and device; every other one is compared
with it.

A weight is `scale · (code − zero point)` in float32, rounded once to the dtype of the input: exactly what
`QuantizedTensor.dequantize` gives. It is computed in chunks of rows, so a forward holds one dequantized weight and
little else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from auto_round.formats.packing import PACKINGS, decode_codes, decode_zeros, packed_shapes
from auto_round.inference.backends import PackedLayer

_CHUNK = {"cpu": 1 << 18}  # weights dequantized at once: float32 temporaries that stay in the cache
_CHUNK_ELSEWHERE = 1 << 24  # accelerators want few large kernels


class QuantLinear(nn.Module):
    """A linear layer [out, in] over packed codes.

    Buffers `qweight`, `qzeros` (int32), `scales` (float16, never cast) as in `packing.packed_shapes`, and `bias` [out]
    if the layer has one. `g_idx` int32 [in], the group of each input, is kept only where groups are not of consecutive
    inputs (GPTQ's act-order).
    """

    backend = "torch"
    backend_reason = ""  # why this backend was chosen, in words

    def __init__(self, layer: PackedLayer):
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._loaded: set[str] = set()
        self._ready = False
        self._constant_zero: int | None = None
        shapes = packed_shapes(layer.packing, layer.out_features, layer.in_features, layer.groups, layer.bits)
        for name, shape in shapes.items():
            dtype = torch.float16 if name == "scales" else torch.int32
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        has_g_idx = PACKINGS[layer.packing][0] == "gptq"
        self.register_buffer("g_idx", torch.empty(layer.in_features, dtype=torch.int32) if has_g_idx else None)
        bias = nn.Parameter(torch.empty(layer.out_features, dtype=layer.dtype), requires_grad=False)
        self.bias = bias if layer.has_bias else None

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight [out, in], computed on every access (models read its dtype, or fold it).

        Before the checkpoint is loaded it is an empty stand-in, marked as initialized: a model's `_init_weights` may
        reach for the weights of its children and must leave them alone.
        """
        if self._ready:
            return self.dequantize(self.layer.dtype)
        stand_in = torch.empty(self.out_features, self.in_features, dtype=self.layer.dtype, device="meta")
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
        return stand_in

    def post_init(self) -> None:
        """Check that everything arrived, once the checkpoint is loaded.

        Raises:
            ValueError: a packed tensor is missing, has the wrong shape, or holds what no layer has.
        """
        self._check_loaded()
        self._check_groups()
        zeros = decode_zeros(self.layer.packing, self.qzeros, self.layer.bits)
        first = int(zeros.flatten()[0])
        self._constant_zero = first if bool((zeros == first).all()) else None
        if not bool(self.scales.isfinite().all()):
            raise ValueError(f"{self.layer.name}.scales holds NaN or Inf: the checkpoint is damaged")
        if self.scales.dtype != torch.float16:  # a model that keeps parts in float32 had them cast up, losslessly
            half = self.scales.half()
            self.scales = half if torch.equal(half.float(), self.scales.float()) else self.scales.float()
        self._ready = True

    def _check_loaded(self) -> None:
        for name in ("qweight", "qzeros", "scales", *(["bias"] if self.bias is not None else [])):
            tensor = getattr(self, name)
            if name not in self._loaded or tensor.is_meta:
                raise ValueError(
                    f"the checkpoint has no usable tensor {self.layer.name}.{name} (expected {list(tensor.shape)}): "
                    "its quantization_config does not describe its weights"
                )

    def _check_groups(self) -> None:
        """Drop a `g_idx` that says nothing; refuse one that names groups that there are not."""
        if self.g_idx is None:
            return
        if "g_idx" in self._loaded and self.layer.groups > 1:
            groups = self.g_idx.long()
            if groups.shape != (self.in_features,) or int(groups.min()) < 0 or int(groups.max()) >= self.layer.groups:
                raise ValueError(f"{self.layer.name}.g_idx names groups beyond its {self.layer.groups}: damaged")
            if not torch.equal(groups, torch.arange(self.in_features, device=groups.device) // self.layer.group_size):
                self.g_idx = groups.int()
                return
        self.g_idx = None

    def require_order(self) -> None:
        """Refuse a layer whose groups are known to be of other inputs than consecutive ones, and not which.

        Raises:
            ValueError: the checkpoint had no `g_idx`.
        """
        if "g_idx" not in self._loaded and self.layer.groups > 1:
            raise ValueError(
                f"{self.layer.name} has no g_idx, but desc_act says that its inputs were reordered: download it again"
            )

    def codes(self, start: int, stop: int) -> torch.Tensor:
        """uint8 codes [stop - start, in] of some outputs (multiples of 32)."""
        per_word = 8 if PACKINGS[self.layer.packing][0] == "awq" else 1
        words = self.qweight[:, start // per_word : stop // per_word]
        return decode_codes(self.layer.packing, words, self.layer.bits)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] in `dtype`."""
        layer, device = self.layer, self.scales.device
        weight = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device=device)
        scales = self.scales.t().float().unsqueeze(-1)
        zeros = self._zeros()
        step = max(64, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // layer.in_features // 64 * 64)
        for start in range(0, layer.out_features, step):
            rows = slice(start, min(start + step, layer.out_features))
            values = self.codes(rows.start, rows.stop).float()
            zero = zeros[rows] if isinstance(zeros, torch.Tensor) else zeros
            if self.g_idx is not None:
                zero = zero[:, self.g_idx, 0] if isinstance(zero, torch.Tensor) else zero
                values.sub_(zero).mul_(scales[rows][:, self.g_idx, 0])
            else:
                values = values.view(-1, layer.groups, layer.group_size).sub_(zero).mul_(scales[rows])
            weight[rows] = values.view(-1, layer.in_features)
        return weight

    def _zeros(self) -> torch.Tensor | float:
        """Zero points [out, groups, 1] in float32, or the number that all of them are."""
        if self._constant_zero is not None:
            return float(self._constant_zero)
        return decode_zeros(self.layer.packing, self.qzeros, self.layer.bits).float().unsqueeze(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantize(x.dtype), bias)

    def __setattr__(self, name: str, value: Any) -> None:
        # Transformers marks a tensor that it read from a checkpoint before putting it here; one that is missing gets
        # uninitialized memory instead. The mark does not survive moves between devices, so it is noted at once.
        if getattr(value, "_is_hf_initialized", False):
            self._loaded.add(name)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._loaded.update(name for name in (*self._buffers, "bias") if prefix + name in state_dict)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if "g_idx" in self._loaded and self.g_idx is None:  # dropped after the check; readers of the copy want it
            inputs = torch.arange(self.in_features, dtype=torch.int32, device=self.scales.device)
            destination[prefix + "g_idx"] = inputs // self.layer.group_size

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        """Move, but never cast, the scales: the codes were decided for these values."""
        before = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != before.dtype:
            self.scales = before.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.layer}, backend={self.backend}"


def needs_grad(x: torch.Tensor) -> bool:
    """Whether a gradient will be asked for: kernels without one leave such inputs to the reference."""
    return x.requires_grad and torch.is_grad_enabled()
