"""Loading models without their weights, finding their blocks and layers, and asking them for text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.modeling.checkpoint import Checkpoint, CheckpointError
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import LayerInfo, PlanError, match_layers
from auto_round.special_model_handler import model_traits
from auto_round.utils.common import is_supported_layer, is_transposed

MIN_COVERAGE = 0.95
_VISION = ("vision", "visual", "image", "img")
_AUDIO = ("audio", "speech", "wav", "waveform")
_MULTIMODAL_KEYS = ("vision_config", "audio_config", "image_token_id", "image_token_index", "visual", "thinker_config")


def resolve_model_dir(model: str, trust_remote_code: bool = False) -> Path:
    """A local directory as it is; a hub id downloaded (weights as safetensors, no pickles, code only if trusted).

    Raises:
        CheckpointError: neither a directory nor a hub id that can be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise CheckpointError(f"the model folder {model} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns + (["*.py"] if trust_remote_code else [])))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model!r} is neither a local folder nor a hub model that can be reached ({type(error).__name__}): "
            "check the spelling and the network, or download it and give its folder"
        ) from error


def load_config(directory: Path, trust_remote_code: bool = False) -> Any:
    """The model's configuration through Transformers, with one clear sentence for what can be wrong."""
    from transformers import AutoConfig

    file = directory / "config.json"
    if not file.exists():
        raise CheckpointError(f"{directory} has no config.json: it is not a Transformers model folder")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error})") from error
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "an unknown method")
        raise CheckpointError(
            f"{directory} is quantized already ({method}), and quantizing it again would lose quality twice: "
            "give the original"
        )
    if "auto_map" in raw and not trust_remote_code:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if raw.get("model_type") not in CONFIG_MAPPING:
            raise CheckpointError(
                f"{directory} brings its own code (auto_map), which is not run unless you trust it: "
                "read it, then pass trust_remote_code=True (--trust_remote_code)"
            )
    return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer beside the model, or None if the folder has none."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model", "vocab.txt")
    if not any((directory / name).exists() for name in names):
        return None
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)


def load_streamed(
    directory: Path,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> StreamedModel:
    """Build a model without its weights and attach its checkpoint. Blocks are declared later (`set_blocks`)."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(directory)
    config = load_config(directory, trust_remote_code)
    dtype = dtype or main_dtype(checkpoint)
    # Buffers are computed from the configuration, not stored, so they must be real; only parameters are left out.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.eval().requires_grad_(False)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return StreamedModel(model, checkpoint, device)


def main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype that most bytes of a checkpoint are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for entry in checkpoint.entries.values():
        if entry.dtype in (torch.float16, torch.bfloat16, torch.float32):
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


def get_block_names(model: nn.Module, quant_vision: bool = False) -> list[list[str]]:
    """Full names of the model's blocks, one list per stack.

    A handler for the model type is asked first; otherwise every outermost ModuleList whose members hold quantizable
    layers is a stack. Stacks of vision towers count when `quant_vision` is set, audio towers never.
    """
    handler = model_traits(model).block_handler
    if handler is not None:
        return handler(model, quant_vision)
    stacks = [names for path, names in _module_lists(model) if _wanted_tower(path, quant_vision)]
    return [names for names in stacks if any(_has_layers(model.get_submodule(name)) for name in names)]


def _module_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield path, [f"{path}.{index}" for index in range(len(child))]
        else:
            yield from _module_lists(child, path + ".")


def _wanted_tower(path: str, quant_vision: bool) -> bool:
    lowered = path.lower()
    if any(word in lowered for word in _AUDIO):
        return False
    return quant_vision or not any(word in lowered for word in _VISION)


def _has_layers(module: nn.Module) -> bool:
    return any(is_supported_layer(child) for child in module.modules())


def select_blocks(stacks: list[list[str]], wanted: str | Sequence | None) -> list[list[str]]:
    """Restrict detected blocks to `to_quant_block_names`: patterns (comma-separated), or the nested list itself."""
    if not wanted:
        return stacks
    if not isinstance(wanted, str):
        nested = [list(item) if not isinstance(item, str) else [item] for item in wanted]
        return nested if any(not isinstance(item, str) for item in wanted) else [[item] for item in wanted]
    names = [name for stack in stacks for name in stack]
    hits = {name for pattern in wanted.split(",") for name in match_layers(pattern.strip(), names)}
    return [kept for stack in stacks if (kept := [name for name in stack if name in hits])]


def find_layers(model: nn.Module, stacks: Sequence[Sequence[str]]) -> list[LayerInfo]:
    """Every layer that could be quantized, in the order of the module tree.

    Raises:
        PlanError: the model has none, or blocks whose weights mostly sit outside such layers.
    """
    blocks = [name for stack in stacks for name in stack]
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    seen: dict[int, str] = {}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = []
    for name, module in model.named_modules():
        if not is_supported_layer(module) or id(module.weight) in seen:
            continue
        seen[id(module.weight)] = name
        rows, columns = module.weight.shape
        transposed = is_transposed(module)
        if transposed:
            rows, columns = columns, rows
        layers.append(
            LayerInfo(
                name=name,
                out_features=rows,
                in_features=columns,
                block=next((block for block in blocks if name.startswith(block + ".")), None),
                tied=f"{name}.weight" in tied or id(module.weight) in embeddings,
                transposed=transposed,
                has_bias=getattr(module, "bias", None) is not None,
                dtype=module.weight.dtype,
            )
        )
    _check_coverage(model, blocks, layers)
    return layers


def _check_coverage(model: nn.Module, blocks: list[str], layers: list[LayerInfo]) -> None:
    """Refuse a model whose block weights are mostly in parameters that no layer covers (fused experts and the like)."""
    covered = {f"{info.name}.weight" for info in layers if info.block}
    if not blocks or not covered:
        tree = ", ".join(name for name, _ in model.named_children())
        raise PlanError(
            f"No quantizable layers found in {type(model).__name__} (children: {tree}): name its blocks with "
            "to_quant_block_names, or add a handler to SPECIAL_MULTIMODAL_BLOCK in auto_round/special_model_handler.py"
        )
    total = missed = 0
    largest: tuple[int, str] = (0, "")
    for block in blocks:
        for name, parameter in model.get_submodule(block).named_parameters(prefix=block):
            if parameter.dim() < 2 or min(parameter.shape[-2:]) < 32:
                continue
            total += parameter.numel()
            if name not in covered:
                missed += parameter.numel()
                largest = max(largest, (parameter.numel(), name))
    if total and missed > (1 - MIN_COVERAGE) * total:
        raise PlanError(
            f"only {100 * (total - missed) / total:.0f} % of the block weights of {type(model).__name__} are in "
            f"layers that can be quantized; the largest other is {largest[1]} ({largest[0] / 1e6:.1f} M elements): "
            "register an unfuser for its module in auto_round/modeling/fused_moe/, or its layer type in "
            "auto_round/utils/common.py"
        )


def get_lm_head_name(model: nn.Module) -> str | None:
    """Name of the output projection, if the model has one that is a quantizable layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not is_supported_layer(head):
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def is_mllm_model(model_or_path: nn.Module | str | os.PathLike, platform: str | None = None) -> bool:
    """Whether a model takes images, audio or video beside text: by its processor files or configuration."""
    if isinstance(model_or_path, nn.Module):
        config = getattr(model_or_path, "config", None)
        keys = config.to_dict().keys() if config is not None else ()
        return any(key in keys for key in _MULTIMODAL_KEYS)
    directory = resolve_model_dir(str(model_or_path))
    if any((directory / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        return True
    file = directory / "config.json"
    return file.exists() and any(key in json.loads(file.read_text(encoding="utf-8")) for key in _MULTIMODAL_KEYS)


@torch.no_grad()
def model_infer(model: nn.Module, tokenizer: Any, prompt: str = "Hello, my name is", max_new_tokens: int = 32) -> str:
    """Greedy continuation of a prompt, without the prompt."""
    device = next(model.parameters()).device
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    inputs.pop("token_type_ids", None)
    length = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, length:], skip_special_tokens=True)


def check_to_quantized(config: Any) -> bool:
    """Whether a layer's scheme (mapping or object) quantizes its weight or its activations."""

    def read(key: str) -> int:
        value = config.get(key) if hasattr(config, "get") else getattr(config, key, None)
        return 16 if value is None else int(value)

    return read("bits") <= 8 or read("act_bits") <= 8
