"""Which of llama.cpp's tensor types each layer gets in a file of a type such as Q4_K_M.

The rules are those of llama.cpp's own quantizer (`src/llama-quant.cpp`): layers whose errors cost most, the values of
attention and the second matrix of feed-forward networks, get more bits in some blocks, and shapes that a type's blocks
do not divide get another type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from auto_round.formats.gguf_blocks import BLOCKS
from auto_round.formats.gguf_models import Names, family_of
from auto_round.plan import LayerInfo, PlanError
from auto_round.schemes import GGUF_FILES, GGUF_TYPES, QuantizationScheme

FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""The type for rows that are no multiple of a super-block's 256 weights."""
_KEPT = re.compile(r"(ffn_gate_inp|ffn_gate_inp_shexp|position_embd)\.weight$")
_EIGHT_EXPERTS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")


@dataclass(frozen=True)
class Place:
    """Where a layer stands. block: its number; blocks: how many; shared: heads that share keys and values;
    experts: how many there are; huge: the 70B model, whose values are few."""

    block: int
    blocks: int
    shared: int
    experts: int
    huge: bool

    @property
    def more(self) -> bool:
        """The first and last eighths of the blocks, and every third between."""
        first = self.blocks // 8
        return self.block < first or self.block >= 7 * self.blocks // 8 or (self.block - first) % 3 == 2


Rule = Callable[[Place], str | None]


def _always(kind: str) -> Rule:
    return lambda place: kind


def _first_eighth(kind: str) -> Rule:
    return lambda place: kind if place.block < place.blocks // 8 else None


def _more(place: Place) -> str | None:
    return "Q6_K" if place.more else None


RULES: dict[str, dict[str, Rule]] = {
    "Q2_K": {
        "attn_v": lambda p: "Q4_K" if p.shared >= 4 else "Q3_K",
        "ffn_down": _always("Q3_K"),
        "attn_output": _always("Q3_K"),
    },
    "Q2_K_S": {"attn_v": lambda p: "Q4_K" if p.shared >= 4 else None, "ffn_down": _first_eighth("Q4_K")},
    "Q3_K_M": {
        "attn_v": lambda p: "Q5_K" if p.block < 2 else "Q4_K",
        "ffn_down": lambda p: "Q5_K" if p.block < p.blocks // 16 else "Q4_K",
        "attn_output": _always("Q4_K"),
    },
    "Q3_K_L": {
        "attn_v": _always("Q5_K"),
        "ffn_down": _always("Q5_K"),
        "attn_output": _always("Q5_K"),
    },
    "Q4_K_S": {"attn_v": lambda p: "Q5_K" if p.block < 4 else None, "ffn_down": _first_eighth("Q5_K")},
    "Q4_K_M": {"attn_v": _more, "ffn_down": _more},
    "Q5_K_M": {"attn_v": _more, "ffn_down": _more},
}
"""File type → role of a layer → its tensor type; what is not here has the type that the file is named after."""


def recipe(file_type: str, layers: Sequence[LayerInfo], config: Any) -> dict[str, tuple[QuantizationScheme, str]]:
    """(scheme, reason) of every layer, output head and embedding (a `LayerInfo` of role "embedding") by its name.

    file_type: one of `GGUF_FILES`, such as "Q4_K_M". A scheme of 16 bits keeps the layer.

    Raises:
        PlanError: no such file type, or a model that llama.cpp does not know.
    """
    file_type = file_type.upper()
    if file_type not in GGUF_FILES:
        raise PlanError(f"there is no GGUF file type {file_type!r}; known: {', '.join(GGUF_FILES)}")
    names = Names(config)
    found = {info.name: names.find(f"{info.name}.weight")[0] for info in layers if not info.tied}
    chosen = {info.name: (_keep(), "tied to the input embedding") for info in layers if info.tied}
    tied = "output.weight" not in found.values()
    for info in layers:
        if not info.tied:
            chosen[info.name] = _choose(file_type, info, found[info.name], tied, config)
    return chosen


def _choose(file_type: str, info: LayerInfo, tensor: str, tied: bool, config: Any) -> tuple[QuantizationScheme, str]:
    if info.role == "router" or _KEPT.search(tensor):
        return _keep(), "llama.cpp keeps it: small, and it decides"
    kind, reason = GGUF_FILES[file_type], f"most of {file_type}"
    if tensor == "output.weight" or (tensor == "token_embd.weight" and tied):
        head = "Q8_0" if info.in_features % BLOCKS[kind].weights or kind == "Q8_0" else "Q6_K"
        kind, reason = head, "output head" if tensor == "output.weight" else "embedding and output head in one"
    elif tensor.startswith("blk."):
        role = tensor.split(".")[2].removesuffix("_exps").removesuffix("_shexp")
        role = "attn_v" if role == "attn_qkv" else role  # values are a part of it
        better = _better(file_type, kind, role, _place(tensor, config))
        if better != kind:
            kind, reason = better, f"{role} in {file_type}"
    return _fitted(kind, reason, info.in_features)


def _place(tensor: str, config: Any) -> Place:
    blocks, heads = config.num_hidden_layers, config.num_attention_heads
    shared = heads // (getattr(config, "num_key_value_heads", None) or heads)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    huge = blocks == family_of(config).huge and shared > 1
    return Place(int(tensor.split(".")[1]), blocks, shared, experts, huge)


def _better(file_type: str, kind: str, role: str, place: Place) -> str:
    """The tensor type of a layer in a block, before its shape is looked at."""
    rule = RULES.get(file_type, {}).get(role)
    wanted = (rule and rule(place)) or kind
    if role == "attn_v" and place.huge and wanted in ("Q3_K", "Q4_K"):
        wanted = "Q5_K"
    if place.experts == 8 and role in ("attn_k", "attn_v"):
        return "Q8_0"
    if place.experts == 8 and role == "attn_output":
        return "Q5_K" if file_type in _EIGHT_EXPERTS else kind
    return wanted


def _fitted(kind: str, reason: str, columns: int) -> tuple[QuantizationScheme, str]:
    """The type, or one whose blocks divide the row."""
    if columns % BLOCKS[kind].weights == 0:
        return GGUF_TYPES[kind], reason
    other = FALLBACK.get(kind)
    if other is not None and columns % BLOCKS[other].weights == 0:
        return GGUF_TYPES[other], f"{reason}; {columns} inputs are no multiple of {kind}'s 256"
    return _keep(), f"{columns} inputs are no multiple of 32, which llama.cpp's types need"


def _keep() -> QuantizationScheme:
    return QuantizationScheme(bits=16, group_size=-1, data_type="float")
