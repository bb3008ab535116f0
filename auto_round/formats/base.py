"""What an export format is: pure functions between quantized tensors and the tensors of a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.data_type.base import QuantizedTensor
from auto_round.modeling.streaming import TensorShape
from auto_round.plan import LayerInfo, LayerPlan, ModelPlan

__all__ = ["ExportFormat", "Place", "TensorShape"]


@dataclass(frozen=True)
class Place:
    """Where a layer's tensor stands in a file that does not store it under the layer's own name.

    index, count: it is slice `index` of a tensor [count, ...], which holds those of `count` layers; None: all of it.
    """

    name: str
    index: int | None = None
    count: int | None = None

    def shape(self, part: TensorShape) -> TensorShape:
        """Shape of the tensor, of which a layer's has the shape `part`."""
        return part if self.count is None else TensorShape((self.count, *part.shape), part.dtype)


class ExportFormat(ABC):
    """A file format bound to one plan. It may refuse the plan (when built), never change it.

    Suffixes name a layer's tensors: `qweight` is written as `<layer>.qweight`. Biases are no business of a format:
    they are carried over from the source.

    Attributes:
        plain: the result is an ordinary checkpoint, read without anybody's quantizer.
        pack_attention: float32 scale [1] or [heads], whether it is per head → the tensor as the format stores it; None
            where it has no place for attention's scales, so that they are refused (`export.check_attention`).
        write_folder: writes the whole model, for containers that are not safetensors; same arguments and duties as
            `export.write_folder`.
    """

    name: str
    plan: ModelPlan
    plain: bool = False
    pack_attention: Callable[[torch.Tensor, bool], torch.Tensor] | None = None
    write_folder: Callable[..., Any] | None = None

    @abstractmethod
    def layout(self, layer: LayerPlan) -> dict[str, TensorShape]:
        """Suffix → shape and dtype of what `pack` returns for this layer."""

    @abstractmethod
    def pack(self, tensor: QuantizedTensor, info: LayerInfo) -> dict[str, torch.Tensor]:
        """Suffix → tensor. Moves bits; rounds nothing."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: LayerPlan) -> QuantizedTensor | None:
        """The inverse of `pack`; None where the format stores plain floats (`fake`)."""

    def place(self, info: LayerInfo, suffix: str) -> Place | None:
        """Where a layer's tensor is written, if not as `<stem>.<suffix>`. Asked of packed and kept tensors alike."""
        return None

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """`quantization_config` for config.json; None where the result is an ordinary checkpoint."""
        return None

    def adapt_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The model's config.json as the format's readers want it."""
        return config

    def as_read(self, tensor: QuantizedTensor, info: LayerInfo, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] that a reader makes of what `pack` wrote, in `dtype` where it is stored as floats."""
        return tensor.dequantize(dtype)
