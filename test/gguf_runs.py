"""Tiny models written as GGUF files without tuning: what the tests of that format start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import random_model, save_tiny

from auto_round.data_type import data_type
from auto_round.data_type.base import WeightTask
from auto_round.formats.export import Ledger
from auto_round.formats.gguf import GgufFormat
from auto_round.formats.gguf_recipe import recipe
from auto_round.modeling.blocks import find_stacks
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import OUTSIDE, ModelPlan, make_plan
from auto_round.schemes import PRESET_SCHEMES
from auto_round.store import BlockResult, Store
from auto_round.utils.model import find_embedding, find_layers, load_streamed
from auto_round.verify.gguf import gguf_file

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 384,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}
GEMMA = {"query_pre_attn_scalar": 64, "sliding_window": 16, "tie_word_embeddings": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 256, "norm_topk_prob": False},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "norm_topk_prob": True},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "num_hidden_layers": 6},
    "phi3": {},
    "gpt2": {"n_inner": None, "tie_word_embeddings": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
}


def family_model(model_type: str, **changes: Any) -> Any:
    """A tiny model of a family whose vectors are not constant, so that what is done to them shows."""
    import transformers

    fields = {**SIZES, **FAMILIES[model_type], **changes}
    if model_type == "gpt2":
        fields = {key: value for key, value in fields.items() if key not in ("head_dim", "num_key_value_heads")}
    model = random_model(transformers.CONFIG_MAPPING[model_type](**fields))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


class GgufRun:
    """A model folder, its plan for a file type (`None`: nothing is quantized), and the codes by rounding to nearest."""

    def __init__(self, model: Any, root: Path, file_type: str | None = "q4_k_m"):
        self.source = save_tiny(model, root / "source")
        self.streamed: StreamedModel = load_streamed(self.source, False)
        stacks = find_stacks(self.streamed.model)
        self.streamed.set_blocks([block for stack in stacks for block in stack])
        config = self.streamed.model.config
        self.layers = [*find_layers(self.streamed.model, stacks), find_embedding(self.streamed.model)]
        mixture = recipe(file_type, self.layers, config) if file_type else None
        scheme = PRESET_SCHEMES[f"GGUF:{file_type.upper()}" if file_type else "BF16"]
        self.plan: ModelPlan = make_plan(self.layers, stacks, scheme, recipe=mixture, config=config)
        self.store = Store(root / "work", {"file_type": file_type})
        self.format = GgufFormat(self.plan, f"gguf:{file_type or 'q8_0'}")
        for part in self.plan.parts:
            self._quantize(part)

    def _quantize(self, part: str) -> None:
        if part != OUTSIDE:
            self.streamed.load(part)
        tensors = {}
        for name, layer in self.plan.quantized(part).items():
            weight = self.streamed.model.get_submodule(name).weight.detach().float()
            weight = weight.t().contiguous() if layer.info.transposed else weight
            task = WeightTask(weight, layer.scheme.weight)
            tensors[name] = data_type(layer.scheme.data_type).quantize(task)
        self.store.save(part, BlockResult(tensors))
        if part != OUTSIDE:
            self.streamed.release(part)

    def write(self, folder: Path) -> tuple[Path, Ledger]:
        """The written file, and what became of the source's tensors."""
        ledger = self.format.write_folder(
            folder, self.streamed, self.plan, self.store, source_dir=self.source, settings={}
        )
        return gguf_file(folder), ledger

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the quantized model, computed by Transformers' code on the dequantized weights."""
        self._put(OUTSIDE)
        with torch.no_grad(), self.streamed.streaming(lambda block, module: self._put(block)) as model:
            return model(input_ids=ids, use_cache=False).logits

    def _put(self, part: str) -> None:
        layers = self.plan.quantized(part)
        if not layers:
            return
        for name, tensor in self.store.load(part, layers).tensors.items():
            weight = tensor.dequantize()
            weight = weight.t() if layers[name].info.transposed else weight
            with torch.no_grad():
                self.streamed.model.get_submodule(name).weight.copy_(weight)
