"""What llama.cpp must be told of each kind of model: names, hyper-parameters, and how its tensors are laid out.

Facts are data, one `Family` for each model type of Transformers; names come from the `gguf` package's own tables. A
configuration that llama.cpp would compute otherwise than Transformers is refused here, before any work.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from auto_round.plan import PlanError

SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new")
_COMMON = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "head_count": "num_attention_heads",
    "head_count_kv": "num_key_value_heads",
    "layer_norm_rms_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_SOFTCAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_ROPE_HALVES = {"attn_q": "q rows", "attn_k": "k rows"}


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp's.

    arch: its name there. keys: method of GGUFWriter without `add_` → attribute of the configuration. requires:
    attribute → values with which llama.cpp computes what Transformers does (an attribute that is absent is fine).
    edits: end of a tensor's name → how its rows or values change (see `gguf_tensors.py`). check: what `requires`
    cannot say; returns the reason for a refusal. windows: llama.cpp knows of its sliding window. rotary: positions are
    rotations. more: values for GGUFWriter that take computing. huge: blocks of the model whose few values of attention
    llama.cpp's mixtures favour (the 70B one). transformers: Transformers reads such files.
    """

    arch: str
    keys: Mapping[str, str] = field(default_factory=lambda: _COMMON)
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: {"hidden_act": SILU})
    edits: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Any], str | None] = lambda config: None
    windows: bool = False
    rotary: bool = True
    more: Callable[[Any], dict[str, Any]] = lambda config: {}
    huge: int | None = None
    transformers: bool = True


def _every(period: int, full: int, config: Any) -> str | None:
    """llama.cpp takes one layer of every `period`, number `full`, for one that sees everything."""
    kinds = list(getattr(config, "layer_types", None) or ())
    want = ["full_attention" if i % period == full else "sliding_attention" for i in range(len(kinds))]
    return None if kinds == want else f"layer_types other than full attention in one layer of {period}"


def _gemma_scale(largest: int, config: Any) -> str | None:
    """Gemma's scores are divided by the root of the head's size; by another only in the model of `largest` layers."""
    head = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == largest else config.head_dim
    wanted = config.query_pre_attn_scalar
    return None if wanted == head else f"query_pre_attn_scalar={wanted} (it computes with {head})"


def _sparse(config: Any) -> str | None:
    sparse = getattr(config, "decoder_sparse_step", 1) == 1 and not getattr(config, "mlp_only_layers", None)
    return None if sparse else "decoder_sparse_step or mlp_only_layers: blocks without experts"


def _phi3(config: Any) -> dict[str, Any]:
    """Phi-3's graph asks for the length before scaling, and takes a window of 0 for none."""
    return {"sliding_window": config.sliding_window or 0, "rope_scaling_orig_ctx_len": _original_length(config)}


_QWEN_MOE = {**_COMMON, **_EXPERTS, "expert_feed_forward_length": "moe_intermediate_size"}
_LLAMA = Family("llama", edits=_ROPE_HALVES, huge=80)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Family(
        "llama",
        keys={**_COMMON, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        edits=_ROPE_HALVES,
        transformers=False,
    ),
    "qwen2": Family("qwen2", huge=80),
    "qwen3": Family("qwen3", requires={"hidden_act": SILU, "attention_bias": (False,)}),
    "qwen2_moe": Family(
        "qwen2moe",
        keys={**_QWEN_MOE, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        requires={"hidden_act": SILU, "norm_topk_prob": (False,), "qkv_bias": (True,)},
        edits={"ffn_gate_inp_shexp": "flat"},
        check=_sparse,
    ),
    "qwen3_moe": Family(
        "qwen3moe",
        keys=_QWEN_MOE,
        requires={"hidden_act": SILU, "norm_topk_prob": (True,), "attention_bias": (False,)},
        check=_sparse,
    ),
    "gemma2": Family(
        "gemma2",
        keys={**_COMMON, **_SOFTCAPS, "sliding_window": "sliding_window"},
        requires={"hidden_activation": GELU, "attention_bias": (False,), "tie_word_embeddings": (True,)},
        edits={"norm": "plus one"},
        check=lambda config: _every(2, 1, config) or _gemma_scale(46, config),
        windows=True,
    ),
    "gemma3_text": Family(
        "gemma3",
        keys={**_COMMON, "final_logit_softcapping": "final_logit_softcapping", "sliding_window": "sliding_window"},
        requires={
            "hidden_activation": GELU,
            "attention_bias": (False,),
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        edits={"norm": "plus one"},
        check=lambda config: _every(6, 5, config) or _gemma_scale(62, config),
        windows=True,
    ),
    "phi3": Family("phi3", more=_phi3),
    "gpt2": Family(
        "gpt2",
        keys={
            "block_count": "n_layer",
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "head_count": "n_head",
            "layer_norm_eps": "layer_norm_epsilon",
            "vocab_size": "vocab_size",
        },
        requires={
            "activation_function": GELU,
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        rotary=False,
        more=lambda config: {"feed_forward_length": config.n_inner or 4 * config.n_embd},
    ),
    "gpt_oss": Family(
        "gpt-oss",
        keys={
            **_COMMON,
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
            "sliding_window": "sliding_window",
        },
        requires={"hidden_act": SILU, "attention_bias": (True,)},
        check=lambda config: _every(2, 1, config),
        windows=True,
        transformers=False,
    ),
}


def load_gguf() -> ModuleType:
    """The `gguf` package.

    Raises:
        PlanError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise PlanError("GGUF files need the gguf package: pip install 'auto-round[gguf]'") from error
    return gguf


def family_of(config: Any) -> Family:
    """The family of a model's configuration.

    Raises:
        PlanError: llama.cpp, or this table, does not know the model type, or it would compute something else.
    """
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(model_type)
    if family is None:
        raise PlanError(
            f"GGUF: no model type {model_type!r} can be written for llama.cpp; those that can: {', '.join(FAMILIES)}"
        )
    problem = family.check(config) or _rope_problem(family, config)
    for name, allowed in family.requires.items():
        if hasattr(config, name) and getattr(config, name) not in allowed:
            problem = f"{name}={getattr(config, name)!r}"
    if problem:
        raise PlanError(f"GGUF: llama.cpp cannot compute a {model_type} model with {problem}: use another format")
    return family


def rope(config: Any) -> Mapping[str, Any]:
    """Rotary parameters, those of full attention where there are several."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("full_attention", parameters)


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotated(config: Any) -> int:
    """Dimensions of a head that are rotated."""
    return int(head_size(config) * rope(config).get("partial_rotary_factor", 1.0))


_ROPE_TYPES = ("default", "linear", "yarn", "llama3", "longrope")


def _rope_problem(family: Family, config: Any) -> str | None:
    kind = rope(config).get("rope_type", "default")
    if not family.rotary or kind in _ROPE_TYPES:
        return None
    return f"rotary positions of type {kind!r}"


def hyper_parameters(config: Any) -> dict[str, Any]:
    """Method of GGUFWriter without `add_` → value, for everything but the tokenizer and `general.*`."""
    family = family_of(config)
    values = {method: getattr(config, attribute, None) for method, attribute in family.keys.items()}
    values |= family.more(config)
    return {method: value for method, value in (values | _rotary_values(family, config)).items() if value is not None}


def _rotary_values(family: Family, config: Any) -> dict[str, Any]:
    if not family.rotary:
        return {}
    kind = rope(config).get("rope_type")
    values = {"key_length": head_size(config), "value_length": head_size(config)}
    values |= {"rope_dimension_count": rotated(config), "rope_freq_base": rope(config).get("rope_theta")}
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    values["rope_freq_base_swa"] = local and local.get("rope_theta")
    if kind in ("linear", "yarn"):
        values["rope_scaling_type"] = load_gguf().RopeScalingType(kind)
        values["rope_scaling_factor"] = rope(config)["factor"]
    if kind == "yarn":
        values["rope_scaling_orig_ctx_len"] = _original_length(config)
    if kind == "longrope":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        values["rope_scaling_attn_factors"] = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")[1]
    return values


def _original_length(config: Any) -> int:
    """The context length before scaling."""
    stated = rope(config).get("original_max_position_embeddings")
    return stated or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings


def rope_tensors(config: Any) -> dict[str, torch.Tensor]:
    """Tensors that llama.cpp divides its rotation frequencies by, where a formula of its own would not do."""
    kind = rope(config).get("rope_type")
    if kind == "longrope":
        parts = {"long": "long_factor", "short": "short_factor"}
        return {f"rope_factors_{n}.weight": torch.tensor(rope(config)[key]).float() for n, key in parts.items()}
    if kind != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    steps = torch.arange(0, rotated(config), 2, dtype=torch.float32) / rotated(config)
    return {"rope_freqs.weight": 1.0 / rope(config)["rope_theta"] ** steps / scaled.float()}


_EXPERT = re.compile(r"\.(\d+)\..*\.experts\.(\d+)\.(\w+)$")
_EXPERT_LAYERS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # Mixtral's names


@functools.cache
def _name_map(arch: Any, blocks: int) -> Any:
    """The gguf package's table, which takes long to make; every file type of a model asks for the same."""
    return load_gguf().get_tensor_name_map(arch, blocks)


class Names:
    """llama.cpp's name of each parameter of a model.

    Raises:
        PlanError: the gguf package lacks the architecture (it is too old).
    """

    def __init__(self, config: Any):
        gguf = load_gguf()
        self.family = family_of(config)
        arch = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == self.family.arch), None)
        if arch is None:
            raise PlanError(f"the installed gguf package does not know {self.family.arch!r}: pip install -U gguf")
        self._names = _name_map(arch, config.num_hidden_layers)

    def find(self, parameter: str) -> tuple[str, int | None]:
        """(tensor name, number of the expert in it or None) of a parameter's name in Transformers.

        Raises:
            PlanError: llama.cpp has no such tensor.
        """
        stem, _, suffix = parameter.rpartition(".")
        if suffix not in ("weight", "bias"):  # a parameter of a module that is no layer, such as attention sinks
            stem, suffix = parameter, "weight"
        expert = _EXPERT.search(stem)
        if expert:
            block, number, leaf = expert.groups()
            stem = f"model.layers.{block}.mlp.experts.{_EXPERT_LAYERS.get(leaf, leaf)}"
        name = self._names.get_name(stem)
        if name is None:
            raise PlanError(f"GGUF: llama.cpp's {self.family.arch} models have no tensor for {parameter}")
        return f"{name}.{suffix}", int(number) if expert else None
