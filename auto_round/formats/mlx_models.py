"""What mlx-lm knows of models: the types that it loads, and what its loaders do with the tensors of experts.

mlx-lm computes all experts of a module at once, from one tensor per projection. Its loaders stack experts that are
stored one by one: some with scales and biases, others only what is called `weight`. For these the stacked tensors are
written, under mlx-lm's names. Facts are from mlx-lm 0.32.2 (`sanitize` of its models).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

MLX_LM = "0.32.2"

_MODEL_TYPES = """
    Klear afm7 afmoe apertus baichuan_m1 bailing_hybrid bailing_moe bailing_moe_linear bailing_moe_v3 bitnet cohere
    cohere2 dbrx deepseek deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v41 deepseek_v41_text dots1 ernie4_5
    ernie4_5_moe exaone exaone4 exaone_moe falcon_h1 falcon_mamba gear gemma gemma2 gemma3 gemma3_text gemma3n gemma4
    gemma4_text gemma4_unified glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neox gpt_oss gptj
    granite granitemoe granitemoehybrid helium hunyuan hunyuan_v1_dense internlm2 internlm3 iquestcoder iquestloopcoder
    jamba joyai_llm_flash kimi_k2 kimi_k25 kimi_k3 kimi_linear kimi_vl laguna lfm2 lfm2-vl lfm2_moe lille-130m llama
    llama4 llama4_text llava longcat_flash longcat_flash_ngram mamba mamba2 mellum mimo mimo_v2_flash minicpm minicpm3
    minimax minimax_m2 minimax_m3_vl ministral3 mistral mistral3 mistral4 mixtral muse_glimmer muse_spark nanbeige
    nanochat nemotron nemotron-nas nemotron_h olmo2 olmo3 olmo_hybrid olmoe openelm phi phi-msft phi3 phi3small phimoe
    phixtral pixtral plamo plamo2 plamo3 prism_hadamard_qwen35 qwen qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5
    qwen3_5_moe qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe recurrent_gemma rwkv7 seed_oss smollm3 solar_open spark2_5
    stablelm starcoder2 step3p5 talkie telechat3 xverse youtu_llm
"""
MODEL_TYPES = frozenset(_MODEL_TYPES.split())
"""The `model_type`s that mlx-lm has a module for, as itself or under another name."""

_STACKS_EXPERTS = """
    afmoe bailing_hybrid bailing_moe bailing_moe_linear deepseek deepseek_v2 deepseek_v3 deepseek_v32 dots1 exaone_moe
    glm4_moe glm4_moe_lite glm_moe_dsa hunyuan jamba joyai_llm_flash kimi_k2 laguna longcat_flash mimo_v2_flash mistral4
    mixtral olmoe phimoe qwen2_moe solar_open
"""
STACKS_EXPERTS = frozenset(_STACKS_EXPERTS.split())
"""Those whose loader stacks the packed weights, scales and biases of experts that are stored one by one."""

_REPACKS_KV_B = """
    bailing_hybrid deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa joyai_llm_flash kimi_k2 longcat_flash mistral4
"""
REPACKS_KV_B = frozenset(_REPACKS_KV_B.split())
"""Those whose loader splits `kv_b_proj` in two and rounds both halves a second time."""

EXPERT = re.compile(r"^(.*)\.experts\.(\d+)\.([^.]+)$")


@dataclass(frozen=True)
class ExpertNames:
    """How mlx-lm calls the layers of experts, where its loader does not stack all of their tensors itself.

    Attributes:
        inside: what stands for `experts.N`.
        layers: last part of a layer's name → mlx-lm's, where it differs.
        dense: ends of the names of layers that are no experts → mlx-lm's, where its loader renames only floats.
        loads: suffixes of tensors that have to be stored one by one all the same.
    """

    inside: str = "switch_mlp"
    layers: Mapping[str, str] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)
    loads: tuple[str, ...] = ()

    def place(self, stem: str) -> tuple[str, int | None]:
        """(mlx-lm's name of a layer, its index among the experts that are stacked there)."""
        expert = EXPERT.match(stem)
        if expert is not None:
            before, index, layer = expert.groups()
            return f"{before}.{self.inside}.{self.layers.get(layer, layer)}", int(index)
        for own, theirs in self.dense.items():
            if stem.endswith(f".{own}"):
                return stem.removesuffix(own) + theirs, None
        return stem, None

    def sources(self, stem: str, count: int) -> list[tuple[str, int | None]]:
        """The inverse of `place`: names of the layers that stand under mlx-lm's name, each with its index."""
        stacked = re.match(rf"^(.*)\.{re.escape(self.inside)}\.([^.]+)$", stem)
        if stacked is not None:
            own = {theirs: own for own, theirs in self.layers.items()}
            return [(f"{stacked[1]}.experts.{i}.{own.get(stacked[2], stacked[2])}", i) for i in range(count)]
        for own, theirs in self.dense.items():
            if stem.endswith(f".{theirs}"):
                return [(stem.removesuffix(theirs) + own, None)]
        return [(stem, None)]


_W123 = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
EXPERT_NAMES: Mapping[str, ExpertNames] = {
    "ernie4_5_moe": ExpertNames(),
    "gemma4": ExpertNames("experts.switch_glu"),
    "gpt_oss": ExpertNames("experts"),
    "granitemoe": ExpertNames(),
    "granitemoehybrid": ExpertNames(),
    "lfm2_moe": ExpertNames(
        layers=_W123, dense={f"feed_forward.{own}": f"feed_forward.{theirs}" for own, theirs in _W123.items()}
    ),
    "llama4": ExpertNames("experts"),
    "mellum": ExpertNames(),
    "minimax_m2": ExpertNames(layers=_W123),
    "nemotron_h": ExpertNames(layers={"up_proj": "fc1", "down_proj": "fc2"}),
    "qwen3_5_moe": ExpertNames(),
    "qwen3_moe": ExpertNames(),
    # Only where it finds weights of single experts does its loader also do what norms and convolutions need.
    "qwen3_next": ExpertNames(loads=("weight",)),
    "qwen3_vl_moe": ExpertNames(),
}
"""Types whose experts are written stacked."""
