"""Loading models without their weights, finding their blocks and layers, and asking them for text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.modeling.blocks import get_block_names as get_block_names  # part of this module's interface
from auto_round.modeling.checkpoint import Checkpoint, CheckpointError
from auto_round.modeling.reading import AGAIN, check_links, kind_of, read_json, reading
from auto_round.modeling.sources import open_checkpoint
from auto_round.modeling.streaming import StreamedModel
from auto_round.modeling.trust import LimitedTensors, check_sizes, check_trusted
from auto_round.plan import MIN_COVERAGE, LayerInfo, PlanError, match_layers
from auto_round.utils.common import is_supported_layer, is_transposed, walk, walk_parameters

_TABLES = {  # of text-generating classes, in the order in which they are looked at
    "MODEL_FOR_CAUSAL_LM_MAPPING": "AutoModelForCausalLM",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING": "AutoModelForImageTextToText",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING": "AutoModelForMultimodalLM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING": "AutoModelForSeq2SeqLM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING": "AutoModelForSpeechSeq2Seq",
}
CONFIG_REMEDY = "correct config.json, download it again, or update Transformers"
_MULTIMODAL_KEYS = ("vision_config", "audio_config", "image_token_id", "image_token_index", "visual", "thinker_config")


def resolve_model_dir(model: str, trust_remote_code: bool = False) -> Path:
    """A local directory as it is; a hub id downloaded (weights as safetensors, no pickles, code only if trusted).

    Raises:
        CheckpointError: neither a directory nor a hub id that can be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.absolute()  # the program may change its directory during the run
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
    """The model's configuration through Transformers, with one clear sentence for what can be wrong.

    Raises:
        CheckpointError: there is none, it cannot be used, or it needs code that is not trusted.
    """
    config = read_config(directory, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # the weights are read as floats, whatever they are stored in
    return config


def read_config(directory: Path, trust_remote_code: bool = False) -> Any:
    """The same with what it says of its quantization. Raises CheckpointError as `load_config` does."""
    from transformers import AutoConfig

    file = directory / "config.json"
    if not file.exists():
        raise CheckpointError(f"{directory} has no config.json: it is not a Transformers model folder")
    raw = read_json(file)
    check_sizes(file, raw)
    classes = raw.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{file}: architectures is {kind_of(classes)}, not a list of names: {CONFIG_REMEDY}")
    if not trust_remote_code:
        check_trusted(file, raw)
    with reading(file, CONFIG_REMEDY, keep=(ImportError,)):
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)


def model_class(config: Any) -> Any:
    """The class that generates text with this configuration: the one it names, else by Transformers' tables.

    Raises:
        CheckpointError: Transformers knows no such class.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    tables = [getattr(auto, name) for name in _TABLES if hasattr(auto, name)]
    known = [table[type(config)] for table in tables if type(config) in table]
    classes = [c for item in known for c in (item if isinstance(item, (tuple, list)) else [item])]
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or []]
    for wanted in named:
        if wanted in classes or (_is_model(wanted) and hasattr(wanted, "generate") and not classes):
            return wanted
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) or not classes:
        if getattr(config, "auto_map", None):
            return transformers.AutoModelForCausalLM
        raise CheckpointError(
            f"Transformers {transformers.__version__} has no text-generating class for model_type "
            f"{config.model_type!r}: it may need a newer version, or the model's own code (trust_remote_code=True)"
        )
    return classes[0]


def _is_model(found: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(found, type) and issubclass(found, PreTrainedModel)


def auto_class_name(config: Any) -> str:
    """The name of Transformers' Auto class that loads this model."""
    from transformers.models.auto import modeling_auto as auto

    for table, name in _TABLES.items():
        if hasattr(auto, table) and type(config) in getattr(auto, table):
            return name
    return "AutoModelForCausalLM"


def build_empty(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """A model of that configuration with its parameters on the meta device; buffers are real."""
    from accelerate import init_empty_weights

    cls = model_class(config)
    where = getattr(config, "_name_or_path", "") or config.model_type
    # Buffers are computed from the configuration, not stored, so they must be real; only parameters are left out.
    naming = reading(f"the model of {where}/config.json", CONFIG_REMEDY, (ImportError,))
    with naming, init_empty_weights(include_buffers=False), LimitedTensors():
        if hasattr(cls, "_from_config"):
            model = cls._from_config(config, dtype=dtype)
        else:
            model = cls.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval().requires_grad_(False)


def only_gguf(directory: str | Path) -> dict[str, str]:
    """What tells Transformers to read a folder's only GGUF file; empty for other folders."""
    found = sorted(Path(directory).glob("*.gguf"))
    return {"gguf_file": found[0].name} if len(found) == 1 and not (Path(directory) / "config.json").exists() else {}


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer beside the model, or None if the folder has none."""
    from transformers import AutoTokenizer

    source = only_gguf(directory)
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model", "vocab.txt")
    if not source and not any((directory / name).exists() for name in names):
        return None
    with reading(f"the tokenizer of {directory}", keep=(ImportError,)):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code, **source)
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise ValueError(f"model_max_length is {kind_of(tokenizer.model_max_length)}, not a number")
    return tokenizer


def load_streamed(
    directory: Path,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> StreamedModel:
    """Build a model without its weights and attach its checkpoint. Blocks are declared later (`set_blocks`)."""
    config = load_config(directory, trust_remote_code)
    checkpoint = open_source(directory, dtype)
    dtype = dtype or main_dtype(checkpoint)
    model = build_empty(config, dtype, trust_remote_code)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return StreamedModel(model, checkpoint, device)


def open_source(directory: Path, dtype: torch.dtype | None = None, headers_only: bool = False) -> Checkpoint:
    """The weights of a model folder as floats, whatever they are stored in."""
    check_links(directory)
    file = directory / "config.json"
    raw = read_json(file)
    text = raw.get("text_config")
    quantization = raw.get("quantization_config") or (text if isinstance(text, dict) else {}).get("quantization_config")
    if quantization and not isinstance(quantization, dict):
        raise CheckpointError(f"{file}: quantization_config is {kind_of(quantization)}, not settings: {AGAIN}")
    return open_checkpoint(directory, quantization, dtype or torch.bfloat16, headers_only)


def main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype that most bytes of a checkpoint are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for entry in checkpoint.entries.values():
        if entry.dtype in (torch.float16, torch.bfloat16, torch.float32):
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


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


def find_layers(
    model: nn.Module,
    stacks: Sequence[Sequence[str]],
    matrices: Callable[[list[str]], Collection[str]] = lambda names: names,
    routers: Collection[str] | None = None,
    source: Callable[[str], tuple[str, bool]] = lambda name: ("", False),
) -> list[LayerInfo]:
    """Every layer that could be quantized, in the order of the module tree.

    matrices: given the names of large parameters that belong to no layer, those that are used as matrices; asked only
    where it decides whether enough of the blocks' weights can be quantized.
    routers: what `find_routers` finds, where that is known.
    source: given a layer's name, the one it is stored under, and whether it is cut out of a fused tensor.

    Raises:
        PlanError: the model has none, or blocks whose weights mostly sit outside such layers.
    """
    blocks = [name for stack in stacks for name in stack]
    inside, tied = _BlockIndex(blocks), set(getattr(model, "all_tied_weights_keys", None) or {})
    aliases = tied_layers(model)
    seen: dict[int, str] = {}
    modules = list(walk(model))
    embeddings = {id(m.weight) for _, m in modules if isinstance(m, nn.Embedding)}
    routers = find_routers(model, blocks) if routers is None else routers
    layers = []
    for name, module in modules:
        if not is_supported_layer(module) or id(weight := module.weight) in seen or name in aliases:
            continue
        seen[id(weight)] = name
        transposed = is_transposed(module)
        rows, columns = weight.shape[::-1] if transposed else weight.shape
        stored, fused = source(name)
        layers.append(
            LayerInfo(
                name=name,
                out_features=rows,
                in_features=columns,
                block=inside.of(name),
                tied=f"{name}.weight" in tied or id(weight) in embeddings,
                transposed=transposed,
                has_bias=getattr(module, "bias", None) is not None,
                dtype=weight.dtype,
                role="router" if name in routers else "",
                fused=fused,
                stored=stored,
            )
        )
    _check_coverage(model, blocks, layers, routers, matrices)
    return layers


def find_embedding(model: nn.Module) -> LayerInfo | None:
    """The table of input embeddings, which only llama.cpp's files quantize."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # not a Transformers model, or one without text
        return None
    if not isinstance(table, nn.Embedding):
        return None
    name = next(name for name, module in walk(model) if module is table)
    rows, columns = table.weight.shape
    return LayerInfo(name, rows, columns, None, dtype=table.weight.dtype, role="embedding")


def tied_layers(model: nn.Module) -> dict[str, str]:
    """Layers whose weight is another layer's, stored under its name only: layer → that other one."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    if not ties:
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {name for name, module in modules.items() if is_supported_layer(module)}
    pairs = ((name.rpartition("."), home.rpartition(".")) for name, home in ties.items())
    return {
        layer: other
        for (layer, _, leaf), (other, _, home_leaf) in pairs
        if leaf == home_leaf == "weight" and {layer, other} <= layers
    }


class _BlockIndex:
    """Finds the block that a module sits in by looking its prefixes up."""

    def __init__(self, blocks: Sequence[str]):
        self._blocks = set(blocks)

    def of(self, name: str) -> str | None:
        while name:
            if name in self._blocks:
                return name
            name = name.rpartition(".")[0]
        return None


def find_routers(model: nn.Module, blocks: Sequence[str]) -> set[str]:
    """Layers, and bare matrices, that choose among experts: a part that ends in one output for each of them.

    Told by structure: alike modules numbered from 0 are a set of E experts; what stands beside them, ends in a matrix
    of E rows (or E + 1, where none is a choice) and has no other as narrow, chooses.
    """
    found: set[str] = set()
    for block in blocks:
        modules = list(walk(model.get_submodule(block), block))
        sizes = {module: count for _, module in modules if (count := count_experts(module))}
        inside: set[str] = set()  # a router, and whatever it lies in
        for name, module in reversed(modules) if sizes else ():
            if name in inside:
                continue  # the innermost come first: what stands around a router chooses nothing
            children = module._modules.values()
            counts = {sizes[child] for child in children if child in sizes}
            deeper = {
                sizes[part]
                for child in children
                if child is not None
                for part in child._modules.values()
                if part in sizes
            }
            for path in _choosers(module, counts, deeper - counts):
                found.add(f"{name}.{path}")
                inside.update(_prefixes(f"{name}.{path}"))
    return found


def _prefixes(name: str) -> Iterator[str]:
    """The names of what a module lies in."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def count_experts(module: nn.Module) -> int:
    """How many experts a module holds: alike children, numbered from 0, with layers. 0 where it holds none."""
    if not any(name[-1:].isdigit() for name in module._modules):
        return 0
    members = [(name, child) for name, child in module.named_children() if re.search(r"(^|_)\d+$", name)]
    alike = len({type(child) for _, child in members}) == 1
    if len(members) > 1 and alike and members[0][0].endswith("0") and all(_has_layer(child) for _, child in members):
        return len(members)
    return 0


def _has_layer(module: nn.Module) -> bool:
    return any(is_supported_layer(child) for _, child in walk(module))


def _choosers(module: nn.Module, beside: set[int], deeper: set[int]) -> list[str]:
    """Matrices, by their path in the module, of those of its parts that choose among so many experts.

    beside: numbers of experts that its children hold; deeper: that theirs do, where only a single matrix is believed.
    """
    paths = []
    for name, child in module.named_children() if beside or deeper else ():
        weights = [(path, p) for path, p in walk_parameters(child) if p.dim() == 2]
        if not weights or count_experts(child) or any(count_experts(part) for part in child.children()):
            continue
        wanted = beside if len(weights) > 1 else beside | deeper
        narrowest = weights[-1][1].shape[0]
        if narrowest not in wanted | {count + 1 for count in wanted}:
            continue
        if all(weight.shape[0] > narrowest for _, weight in weights[:-1]):  # unlike a shared expert of E channels
            paths += [f"{name}.{path}".removesuffix(".weight") for path, _ in weights]
    return paths


def _check_coverage(model, blocks: list[str], layers: list[LayerInfo], routers, matrices) -> None:
    """Refuse a model whose block weights are mostly in parameters that no layer covers (fused experts and the like)."""
    covered = {f"{info.name}.weight" for info in layers if info.block}
    if blocks and not covered:
        unknown = {type(module).__name__ for block in blocks for module in _holders(model.get_submodule(block))}
        count = sum(1 for _ in block_matrices(model, blocks))
        raise PlanError(
            f"Quantized 0/{count} layers of {type(model).__name__}: no layer in its blocks is of a known type. "
            f"Their matrices are in {', '.join(sorted(unknown))}: add the layer's type to SUPPORTED_LAYER_TYPES, or "
            "its class name to INNER_SUPPORTED_LAYER_TYPES, in auto_round/utils/common.py"
        )
    if not blocks:
        raise PlanError(
            f"No quantizable layers found in {type(model).__name__}. Looked at: {outline(model)}. Name its blocks "
            "with to_quant_block_names, or add a handler to SPECIAL_MULTIMODAL_BLOCK in "
            "auto_round/special_model_handler.py"
        )
    aliases = tied_layers(model)
    found = {n: p for n, p in block_matrices(model, blocks) if n.removesuffix(".weight") not in aliases}
    sizes = {name: p.numel() for name, p in found.items() if name.removesuffix(".weight") not in routers}
    missed = [name for name in sizes if name not in covered]
    if not _is_too_much(missed, sizes):
        return
    used = set(matrices(missed))
    sizes = {name: size for name, size in sizes.items() if name in covered or name in used}
    missed = [name for name in missed if name in used]
    if _is_too_much(missed, sizes):
        total, lost = sum(sizes.values()), sum(sizes[name] for name in missed)
        largest = max(missed, key=sizes.__getitem__)
        raise PlanError(
            f"only {100 * (total - lost) / total:.0f} % of the block weights of {type(model).__name__} are in "
            f"layers that can be quantized; the largest other is {largest} {list(found[largest].shape)}: "
            "register an unfuser for its module in auto_round/modeling/fused_moe/ (register_replacement), or its "
            "layer type in auto_round/utils/common.py (SUPPORTED_LAYER_TYPES)"
        )


def _holders(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that own a matrix."""
    for child in module.modules():
        if any(parameter.dim() == 2 for parameter in child.parameters(recurse=False)):
            yield child


def _is_too_much(missed: Sequence[str], sizes: Mapping[str, int]) -> bool:
    return sum(sizes[name] for name in missed) > (1 - MIN_COVERAGE) * sum(sizes.values())


def block_matrices(model: nn.Module, blocks: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters in the blocks that are used as matrices: not embeddings, convolutions, or thinner than 32."""
    seen: set[int] = set()
    for block in blocks:
        for name, module in walk(model.get_submodule(block), block):
            if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
                continue
            for own, parameter in module._parameters.items():
                if (
                    parameter is not None
                    and parameter.dim() in (2, 3)
                    and min(parameter.shape[-2:]) >= 32
                    and id(parameter) not in seen
                ):
                    seen.add(id(parameter))
                    yield f"{name}.{own}", parameter


def outline(model: nn.Module, depth: int = 2) -> str:
    """The top of a module tree in one line: `model(embed_tokens: Embedding, layers: ModuleList[2 × Layer])`."""
    parts = []
    for name, child in model.named_children():
        kinds = [type(member).__name__ for member in child.children()]
        if len(kinds) > 1 and len(set(kinds)) == 1:
            parts.append(f"{name}: {type(child).__name__}[{len(kinds)} × {kinds[0]}]")
        elif depth > 1 and kinds:
            parts.append(f"{name}({outline(child, depth - 1)})")
        else:
            parts.append(f"{name}: {type(child).__name__}")
    return ", ".join(parts)


def get_lm_head_name(model: nn.Module) -> str | None:
    """Name of the output projection, if the model has one that is a quantizable layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not is_supported_layer(head):
        return None
    return next((name for name, module in walk(model) if module is head), None)


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
    return file.exists() and any(key in read_json(file) for key in _MULTIMODAL_KEYS)


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
