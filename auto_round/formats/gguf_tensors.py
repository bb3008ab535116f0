"""The tensors of a GGUF file: which parameters of the model each is made of, and how.

Experts of a block are stacked; rows of queries and keys, and gains of norms, change as llama.cpp expects them. Codes
are never rounded again: a row's bytes move as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from auto_round.data_type.base import QuantizedTensor
from auto_round.formats.gguf_blocks import gguf_type, pack, row_bytes
from auto_round.formats.gguf_models import Names, rope_tensors
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import OUTSIDE, LayerPlan, ModelPlan, PlanError
from auto_round.store import Store

FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
WIDE = ("ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd")  # matrices that llama.cpp wants in float32


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    name: llama.cpp's. kind: its type, such as "Q4_K" or "F32". shape: of its weights. parameters: of the model, one
    or one for each expert. edit: what happens to each. value: what it holds, where it is made of the configuration.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: tuple[str, ...] = ()
    edit: str = ""
    value: torch.Tensor | None = None

    @property
    def is_quantized(self) -> bool:
        return self.kind not in FLOATS.values()

    @property
    def nbytes(self) -> int:
        rows = torch.Size(self.shape[:-1]).numel()
        if self.is_quantized:
            return rows * row_bytes(self.kind, self.shape[-1])
        return rows * self.shape[-1] * (4 if self.kind == "F32" else 2)


def layer_kind(plan: LayerPlan) -> str:
    """llama.cpp's tensor type of a layer that is quantized.

    Raises:
        PlanError: it has none for this scheme, or the layer's rows are no whole number of its blocks.
    """
    start = f"{plan.name} cannot be written to a GGUF file: "
    if plan.scheme.act is not None:
        raise PlanError(f"{start}llama.cpp has no fixed formats for activations; use a scheme for weights only")
    try:
        kind = gguf_type(plan.scheme.weight)
        row_bytes(kind, plan.info.in_features)
    except ValueError as error:
        raise PlanError(f"{start}{error}") from error
    return kind


def check_stacks(plan: ModelPlan, names: Names) -> None:
    """Experts that llama.cpp stacks in one tensor have one type.

    Raises:
        PlanError: some have another; names two of them.
    """
    first: dict[str, LayerPlan] = {}
    for layer in plan.layers.values():
        if layer.info.tied:
            continue
        tensor, expert = names.find(f"{layer.name}.weight")
        other = first.setdefault(tensor, layer)
        differ = other.scheme.weight != layer.scheme.weight and (other.is_quantized or layer.is_quantized)
        if expert is not None and differ:
            raise PlanError(
                f"{other.name} and {layer.name} have different schemes, and a GGUF file holds both in {tensor}: "
                "give the experts of a block one scheme"
            )


def list_tensors(streamed: StreamedModel, plan: ModelPlan, names: Names) -> list[GgufTensor]:
    """Every tensor of the file, in its order: what stands outside the blocks, then block by block.

    Raises:
        PlanError: a parameter of the model has no place in llama.cpp's.
    """
    parts: dict[str, list[str]] = {}
    for parameter, _ in streamed.model.named_parameters():
        if parameter not in streamed.ties:
            parts.setdefault(names.find(parameter)[0], []).append(parameter)
    made = [_tensor(name, parameters, streamed, plan, names) for name, parameters in parts.items()]
    made += [
        GgufTensor(name, "F32", tuple(value.shape), value=value) for name, value in rope_tensors(plan.config).items()
    ]
    order = {None: -1} | {block: i for i, block in enumerate(streamed.blocks)}
    return sorted(made, key=lambda t: order[streamed.block_of(t.parameters[0]) if t.parameters else None])


def _tensor(name: str, parameters: list[str], streamed: StreamedModel, plan: ModelPlan, names: Names) -> GgufTensor:
    parameters.sort(key=lambda parameter: names.find(parameter)[1] or 0)
    layer = plan.layers.get(parameters[0].removesuffix(".weight"))
    stem = name.rpartition(".")[0]
    edit = next((edit for end, edit in names.family.edits.items() if stem.endswith(end)), "")
    shape = tuple(streamed.model.get_parameter(parameters[0]).shape)
    if layer is not None and layer.info.transposed:
        shape, edit = shape[::-1], "transposed"
    if edit == "flat":
        shape = (shape[-1],)
    stacked = shape if names.find(parameters[0])[1] is None else (len(parameters), *shape)
    if layer is not None and layer.is_quantized:
        return GgufTensor(name, layer_kind(layer), stacked, tuple(parameters), edit)
    wide = len(shape) == 1 or stem.rpartition(".")[2] in WIDE
    return GgufTensor(name, "F32" if wide else _float_kind(parameters[0], streamed), stacked, tuple(parameters), edit)


def _float_kind(parameter: str, streamed: StreamedModel) -> str:
    stored = streamed.source_tensors().get(streamed.source_name(parameter))
    dtype = stored.dtype if stored is not None else streamed.model.get_parameter(parameter).dtype
    return FLOATS.get(dtype, "F32")


def row_order(edit: str, rows: int, config: Any) -> torch.Tensor:
    """[rows], where each row of the file's tensor comes from.

    Transformers rotates element i of a head with i + half its size, llama.cpp's `llama` models neighbours.
    """
    heads = config.num_attention_heads if edit == "q rows" else config.num_key_value_heads
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def edited(value: torch.Tensor, edit: str, config: Any) -> torch.Tensor:
    """A float tensor as the file has it; `edit` as in `Family.edits`, or "transposed"."""
    if edit.endswith("rows"):
        return value[row_order(edit, len(value), config)]
    if edit == "plus one":  # Gemma's norms multiply by 1 + the gain
        return value.float() + 1
    if edit == "flat":
        return value.reshape(-1)
    return value.t() if edit == "transposed" else value


def edited_rows(tensor: QuantizedTensor, edit: str, config: Any) -> torch.Tensor:
    """The bytes of a quantized layer, whose rows are the layer's outputs also where the source stores it transposed."""
    rows = pack(tensor)
    return rows[row_order(edit, len(rows), config)] if edit.endswith("rows") else rows


def read_tensors(
    streamed: StreamedModel, plan: ModelPlan, store: Store, tensors: list[GgufTensor]
) -> Iterator[tuple[GgufTensor, np.ndarray]]:
    """(tensor, its bytes as uint8) in order; one block's codes and floats are in memory at a time."""
    parts: dict[str, list[GgufTensor]] = {}
    for tensor in tensors:
        block = streamed.block_of(tensor.parameters[0]) if tensor.parameters else None
        parts.setdefault(block or OUTSIDE, []).append(tensor)
    for part, inside in parts.items():
        layers = plan.quantized(part)
        codes = store.load(part, layers).tensors if layers else {}
        with _floats(streamed, part, inside) if part != OUTSIDE else contextlib.nullcontext():
            for tensor in inside:
                yield tensor, _bytes(tensor, streamed, codes, plan.config)


def _floats(streamed: StreamedModel, block: str, tensors: list[GgufTensor]) -> contextlib.AbstractContextManager:
    """The block loaded, if some of its floats are not in the source as they are."""
    wanted = {parameter for tensor in tensors if not tensor.is_quantized for parameter in tensor.parameters}
    return contextlib.nullcontext() if wanted <= streamed.names.direct.keys() else streamed.loaded(block)


def read_parameter(streamed: StreamedModel, parameter: str) -> torch.Tensor:
    """A parameter as the source stores it, where it is stored by itself; else out of the model, its block loaded."""
    if streamed.is_streamed and parameter in streamed.names.direct:
        return streamed.read_source(streamed.names.direct[parameter])
    return streamed.model.get_parameter(parameter).detach().cpu()


def _bytes(
    tensor: GgufTensor, streamed: StreamedModel, codes: Mapping[str, QuantizedTensor], config: Any
) -> np.ndarray:
    if tensor.is_quantized:
        layers = (codes[parameter.removesuffix(".weight")] for parameter in tensor.parameters)
        return torch.cat([edited_rows(layer, tensor.edit, config) for layer in layers]).numpy()
    if tensor.value is not None:
        values = [tensor.value]
    else:
        values = [edited(read_parameter(streamed, name), tensor.edit, config) for name in tensor.parameters]
    dtype = next(dtype for dtype, kind in FLOATS.items() if kind == tensor.kind)
    joined = torch.stack([value.to(dtype) for value in values])
    return joined.contiguous().view(torch.uint8).numpy()
