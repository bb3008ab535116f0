"""What structure cannot tell about a model: the tables of exceptions, honoured before discovery.

Extension points, each one entry and one test:

- `SPECIAL_MULTIMODAL_BLOCK[model_type] = handler(model, quant_vision) -> [[block names], …]` where blocks are not
  found from the module graph, or not all that are found should be quantized;
- `FORWARDS[model_type] = function(model, **sample)`, what `_handle_special_model` makes the model's forward, where its
  own cannot be driven with a calibration sample;
- `SPECIAL_SHARED_CACHE_KEYS[class name] = (arguments, …)` for arguments of blocks that all samples share though they
  look like each sample's own;
- `mllms_with_limited_bs` for types whose samples must not be put in one batch though they look as if they could.

Everything else is found by running the model: see `calibration/discover.py` and `calibration/native.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

BlockHandler = Callable[[nn.Module, bool], list[list[str]]]


def stacks_at(*text: str, vision: tuple[str, ...] = ()) -> BlockHandler:
    """A handler for blocks that are the members of lists at known places; places that a model lacks are left out."""

    def handler(model: nn.Module, quant_vision: bool = False) -> list[list[str]]:
        stacks = []
        for path in (*text, *(vision if quant_vision else ())):
            try:
                container = model.get_submodule(path)
            except AttributeError:
                continue
            stacks.append([f"{path}.{name}" for name, _ in container.named_children()])
        return stacks

    return handler


_OMNI = stacks_at(
    *("thinker.model.layers", "thinker.model.language_model.layers"),
    vision=tuple(f"thinker.{at}{tower}" for at in ("", "model.") for tower in ("visual.blocks", "audio_tower.layers")),
)

# model_type -> handler that lists the blocks, stack by stack.
SPECIAL_MULTIMODAL_BLOCK: dict[str, BlockHandler] = {
    "bagel": stacks_at("language_model.model.layers"),  # a vision tower and an image decoder stand beside it
    "deepseek_vl_v2": stacks_at("language.model.layers", vision=("vision.blocks", "projector.layers")),
    "glm_image": stacks_at("model.language_model.layers", vision=("model.visual.blocks",)),
    "mimo_audio": stacks_at("model.layers", "layers"),  # its other lists need audio
    "qwen2_5_omni": _OMNI,  # the talker stays: quantizing it harms long speech
    "qwen3_omni_moe": _OMNI,
}

# Architectures whose config.json names another model_type.
ARCHITECTURE_MODEL_TYPE_MAP: dict[str, str] = {
    "MiMoAudioModel": "mimo_audio",
    "MiMoAudioForCausalLM": "mimo_audio",
}

# model_types whose text part is known to be calibrated well with text alone. Others may be, too: it is tried.
SUPPORT_ONLY_TEXT_MODELS: list[str] = [
    *("phi3_v", "cogvlm2", "llava", "qwen2_vl", "qwen2_5_vl", "deepseek_vl_v2", "chatglm", "idefics3", "llama4"),
    *("internvl_chat", "glm4v_moe", "glm_image", "qwen3_vl_moe", "qwen2_5_omni", "qwen3_omni_moe", "gemma3"),
    *("bagel", "mimo_audio", "qwen3_tts"),
]

# model_types (or parts of them) whose samples cannot be put in one batch.
mllms_with_limited_bs: tuple[str, ...] = ("phi3_v", "qwen3_tts")

# class name of the model -> arguments of its blocks that all samples share.
SPECIAL_SHARED_CACHE_KEYS: dict[str, tuple[str, ...]] = {
    "Gemma3ForConditionalGeneration": ("position_embeddings_global", "position_embeddings_local"),
    "MiniMaxText01ForCausalLM": ("slope_rate",),
}


# ---- forwards -------------------------------------------------------------------------------------------------------


def _deepseek_vl_v2(model: nn.Module, input_ids: torch.Tensor, **kwargs: Any) -> Any:
    """Its own forward takes embeddings only."""
    keys = ("images", "images_seq_mask", "images_spatial_crop")
    pictures = {key: kwargs.pop(key) for key in keys if key in kwargs}
    embeddings = model.prepare_inputs_embeds(input_ids, **pictures)
    return model.language(inputs_embeds=embeddings, **kwargs)


def _omni(projection: str) -> Callable[..., Any]:
    """For models whose own forward can only generate: the thinker, then the talker on its hidden states."""

    def forward(model: nn.Module, **kwargs: Any) -> Any:
        output = model.thinker(**kwargs, output_hidden_states=True)
        talker = getattr(model, "talker", None)
        if talker is not None:
            hidden = getattr(talker, projection)(output.hidden_states[-1])
            talker.codec_head(talker.model(inputs_embeds=hidden).last_hidden_state)
        return output

    return forward


def _dia(model: nn.Module, original: Callable, **kwargs: Any) -> Any:
    """Its decoder takes a code for each channel: token ids [B, L] stand for the same code in all of them."""
    ids = kwargs.get("decoder_input_ids")
    if ids is not None and ids.dim() == 2:
        kwargs["decoder_input_ids"] = ids.unsqueeze(-1).expand(-1, -1, model.config.decoder_config.num_channels)
    return original(**kwargs)


def _musicgen(model: nn.Module, input_ids: torch.Tensor, original: Callable, **kwargs: Any) -> Any:
    """Every code book of a frame has a row of its own."""
    books = model.config.get_text_config(decoder=True).num_codebooks
    if input_ids.shape[0] % books:
        input_ids = input_ids.repeat_interleave(books, dim=0)
    return original(input_ids=input_ids, **kwargs)


# model_type -> what stands in for the model's forward; `original` is passed to those that have such a parameter.
FORWARDS: dict[str, Callable[..., Any]] = {
    "deepseek_vl_v2": _deepseek_vl_v2,
    "dia": _dia,
    "musicgen_decoder": _musicgen,
    "musicgen_melody_decoder": _musicgen,
    "qwen2_5_omni": _omni("thinker_to_talker_proj"),
    "qwen3_omni_moe": _omni("hidden_projection"),
}


def _handle_special_model(model: nn.Module) -> nn.Module:
    """Give a model whose own forward cannot be driven by samples one that can; others pass unchanged."""
    forward = FORWARDS.get(resolve_model_type(model))
    if forward is not None and "forward" not in model.__dict__:
        wants_original = "original" in forward.__code__.co_varnames[: forward.__code__.co_argcount]
        model.forward = partial(forward, model, **({"original": model.forward} if wants_original else {}))
    return model


# ---- what the tables say of one model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelTraits:
    """What the tables say of one model."""

    model_type: str
    block_handler: BlockHandler | None
    shared_keys: tuple[str, ...]
    one_by_one: bool


def resolve_model_type(model: nn.Module) -> str:
    """`config.model_type` (by the architecture where that tells better), or an empty string without a configuration."""
    config = getattr(model, "config", None)
    for name in getattr(config, "architectures", None) or ():
        if name in ARCHITECTURE_MODEL_TYPE_MAP:
            return ARCHITECTURE_MODEL_TYPE_MAP[name]
    return getattr(config, "model_type", None) or ""


def model_traits(model: nn.Module) -> ModelTraits:
    """Look the model up in the tables, once."""
    model_type = resolve_model_type(model)
    return ModelTraits(
        model_type=model_type,
        block_handler=SPECIAL_MULTIMODAL_BLOCK.get(model_type),
        shared_keys=SPECIAL_SHARED_CACHE_KEYS.get(type(model).__name__, ()),
        one_by_one=bool(model_type) and any(part in model_type for part in mllms_with_limited_bs),
    )
