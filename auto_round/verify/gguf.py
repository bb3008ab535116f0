"""Checks of a GGUF file with the `gguf` package's reader and dequantizers, which wrote none of its numbers.

Every quantized layer must read back as the store's values bit for bit, every other tensor as the source's, and the
metadata must describe the model; Transformers, where it reads the architecture, must compute the same logits.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from auto_round.formats.gguf_models import Names, family_of, load_gguf, rope_tensors
from auto_round.formats.gguf_tensors import read_parameter
from auto_round.modeling.checkpoint import CheckpointError
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import OUTSIDE, ModelPlan
from auto_round.store import Store
from auto_round.verify.logits import RELOAD_TOLERANCE, logit_error


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file of a folder, if it holds one."""
    return next(iter(sorted(Path(folder).glob("*.gguf"))), None)


def open_gguf(file: Path) -> Any:
    """A reader of the file. Raises CheckpointError where it is no whole GGUF file."""
    try:
        return load_gguf().GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError, struct.error) as error:
        raise CheckpointError(f"{file} cannot be read as a GGUF file: {error}") from error


def unreadable_values(reader: Any) -> str | None:
    """A tensor of the file that dequantizes to NaN or Inf."""
    for tensor in reader.tensors:
        if not np.isfinite(stored_values(tensor, None)).all():
            return f"{tensor.name} dequantizes to NaN or Inf"
    return None


def gguf_problems(file: Path, streamed: StreamedModel, plan: ModelPlan, store: Store) -> str | None:
    """What is wrong with a file: unreadable, another model's metadata, or tensors too many, too few or changed."""
    try:
        reader = open_gguf(file)
    except CheckpointError as error:
        return str(error)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = Names(plan.config)
    wanted = [name for name, _ in streamed.model.named_parameters() if name not in streamed.ties]
    places = {parameter: names.find(parameter) for parameter in wanted}
    return (
        metadata_problem(reader, file, plan.config)
        or _names_problem(tensors, {name for name, _ in places.values()} | rope_tensors(plan.config).keys())
        or _values_problem(tensors, places, streamed, plan, store)
    )


def metadata_problem(reader: Any, file: Path, config: Any) -> str | None:
    """A key that is not what the model's configuration says."""
    arch = family_of(config).arch
    wanted = {
        "general.architecture": arch,
        "general.file_type": load_gguf().LlamaFileType[f"MOSTLY_{file.stem.rpartition('-')[2]}"].value,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
    }
    if getattr(config, "num_key_value_heads", None):
        wanted[f"{arch}.attention.head_count_kv"] = config.num_key_value_heads
    for key, value in wanted.items():
        field = reader.get_field(key)
        found = None if field is None else field.contents()
        if found != value:
            return f"{key} is {found!r}, and the model's configuration says {value!r}"
    tokens = reader.get_field("tokenizer.ggml.tokens")
    if tokens is not None and len(tokens.data) != config.vocab_size:
        return f"the file has {len(tokens.data)} tokens, and the model {config.vocab_size}"
    return None


def _names_problem(tensors: Mapping[str, Any], wanted: set[str]) -> str | None:
    missing, more = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing:
        return f"the file lacks the tensor {missing[0]}"
    return f"the file has a tensor {more[0]} that no parameter is stored in" if more else None


def _values_problem(
    tensors: Mapping[str, Any],
    places: Mapping[str, tuple[str, int | None]],
    streamed: StreamedModel,
    plan: ModelPlan,
    store: Store,
) -> str | None:
    """The first tensor that differs, block by block."""
    for part in (OUTSIDE, *plan.block_names):
        block = None if part == OUTSIDE else part
        layers = plan.quantized(part)
        codes = store.load(part, layers).tensors if layers else {}
        inside = {name: place for name, place in places.items() if streamed.block_of(name) == block}
        if block is not None and not streamed.names.direct.keys() >= inside.keys():
            with streamed.loaded(block):
                problem = _part_problem(tensors, inside, codes, streamed, plan)
        else:
            problem = _part_problem(tensors, inside, codes, streamed, plan)
        if problem:
            return problem
    return None


def _part_problem(tensors, inside, codes, streamed: StreamedModel, plan: ModelPlan) -> str | None:
    for parameter, (name, expert) in inside.items():
        layer = parameter.removesuffix(".weight")
        found = stored_values(tensors[name], expert)
        if layer in codes:
            want = codes[layer].dequantize().numpy()
        else:
            want = read_parameter(streamed, parameter).float().numpy()
            if layer in plan.layers and plan.layers[layer].info.transposed:
                want = want.T
        want = as_llama_cpp(want, name, plan.config)
        if found.shape != want.shape:
            return f"{name} holds {found.shape} for {parameter}, which is {want.shape}"
        if not np.array_equal(found, want):
            what = "quantized values" if layer in codes else "source's values"
            return f"{name} does not hold the {what} of {parameter}: {np.abs(found - want).max():.2e} apart"
    return None


def stored_values(tensor: Any, expert: int | None) -> np.ndarray:
    """float32 weights of a tensor of the file, or of one expert in it."""
    data = tensor.data if expert is None else tensor.data[expert]
    return load_gguf().quants.dequantize(data, tensor.tensor_type)


def as_llama_cpp(values: np.ndarray, tensor: str, config: Any) -> np.ndarray:
    """What llama.cpp wants in the place of a parameter's values.

    Its `llama` models rotate neighbours, Transformers the halves of a head; Gemma's norms have the one added.
    """
    edits = family_of(config).edits
    edit = next((edit for end, edit in edits.items() if tensor.rpartition(".")[0].endswith(end)), None)
    if edit in ("q rows", "k rows"):
        heads = config.num_attention_heads if edit == "q rows" else config.num_key_value_heads
        halves = values.reshape(heads, 2, -1, *values.shape[1:])
        return np.ascontiguousarray(np.swapaxes(halves, 1, 2)).reshape(values.shape)
    if edit == "plus one":
        return values + np.float32(1)
    return values.reshape(-1) if edit == "flat" else values


def unread_reason(config: Any) -> str | None:
    """Why Transformers does not load GGUF files of this model; None if it does."""
    if family_of(config).transformers:
        return None
    return f"Transformers reads no GGUF files of {config.model_type} models: only llama.cpp can load the result"


def _config_to_read_with(file: Path, config: Any) -> Any:
    """The source's configuration, of the class that Transformers takes such a file for (Mistral's are llama's)."""
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    if type(found) is type(config):
        return copy.deepcopy(config)
    return type(found).from_dict({**config.to_dict(), "model_type": found.model_type, "architectures": None})


def reload_gguf_problem(
    file: Path, batch: Any, expected: torch.Tensor, config: Any, routed: bool = False
) -> str | None:
    """Transformers loads the file, and computes the logits of the quantized model.

    config: the source model's; Transformers rebuilds one from the metadata, but without some sizes (experts, heads)
    and without scaled rotations. routed: as in `verify.reload_problem`.
    """
    from auto_round.calibration.native import no_cache, run_logits
    from auto_round.utils.model import model_class

    config = _config_to_read_with(file, config)
    model = model_class(config).from_pretrained(file.parent, gguf_file=file.name, config=config, dtype=torch.float32)
    with no_cache(model):
        got = run_logits(model.eval(), batch, "cpu")
    overall, most = logit_error(got, expected)
    if overall <= RELOAD_TOLERANCE or (routed and most <= RELOAD_TOLERANCE):
        return None
    return f"logits of the model loaded by Transformers are {overall:.2%} away from the quantized model's"
