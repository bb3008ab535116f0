"""From a model to the plan of a run: which blocks, which layers in them, and what becomes of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from auto_round.calibration.discover import called_blocks, executed_stacks, used_as_matrices
from auto_round.calibration.forwards import Amp, Batch
from auto_round.compressors.drafts import draft_layers
from auto_round.compressors.request import Request
from auto_round.formats.gguf_recipe import recipe
from auto_round.formats.parts import stem_of
from auto_round.modeling.blocks import find_stacks, get_block_names
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import ModelPlan, make_plan
from auto_round.schemes import QuantizationScheme
from auto_round.special_model_handler import model_traits
from auto_round.utils.device import is_out_of_memory
from auto_round.utils.model import find_embedding, find_layers, find_routers, get_lm_head_name, select_blocks

Recipe = Mapping[str, tuple[QuantizationScheme, str, bool]]
"""Layer name → (scheme, reason, explicit), which takes the place of the scheme for all."""


class Planner:
    """Decides what becomes of every layer of a model; anew where a format brings another scheme.

    notes: what a person should know of how the blocks were found.
    """

    def __init__(self, streamed: StreamedModel, request: Request, amp: Amp, sample: Callable[[], Batch | None]):
        self._streamed, self._request, self._amp = streamed, request, amp
        self._stacks, note = find_blocks(streamed, request.blocks, request.quant_nontext_module, amp, sample)
        self.notes = [note] if note else []

    def plan(
        self, scheme: QuantizationScheme, gguf: str | None = None, chosen: Recipe | None = None
    ) -> tuple[ModelPlan, list[str]]:
        """(plan, what was changed in it so that the engine that was asked for can load it); see `plan_model`."""
        asked = self._request
        rules = asked.layer_config, asked.ignore_layers, asked.quant_lm_head
        plan = plan_model(self._streamed, self._stacks, scheme, *rules, self._amp, gguf, chosen)
        return asked.target.repair(plan) if asked.target is not None else (plan, [])


def find_blocks(
    streamed: StreamedModel,
    wanted: str | Sequence | None,
    nontext: bool,
    amp: Amp,
    sample: Callable[[], Batch | None],
) -> tuple[list[list[str]], str]:
    """Stacks of blocks to quantize: those that a forward over text calls, in that order, and towers if asked for.

    Every stack is made to stream, also one that is not quantized: memory stays bounded by a block.

    Args:
        wanted: `to_quant_block_names`. nontext: whether towers that text does not reach count.
        sample: gives a calibration sample, asked for where the model does not run on text.

    Returns:
        (stacks, what a person should know, or nothing).
    """
    model = streamed.model
    handler = model_traits(model).block_handler
    handled = handler(model, nontext) if handler is not None else []
    stacks = find_stacks(model)
    chosen = select_blocks(stacks, wanted) if wanted else handled
    named = [name for stack in chosen for name in stack]
    others = [name for stack in stacks for name in stack if not any(_overlap(name, other) for other in named)]
    streamed.set_blocks([*named, *others])
    if chosen:
        return chosen, ""
    if len(stacks) < 2:
        return get_block_names(model, nontext), ""
    called, error = _called(streamed, amp, sample)
    if not called:
        note = f"a forward over text fails ({error}), so blocks were told from the module tree alone; name them with "
        return get_block_names(model, nontext), note + "to_quant_block_names if they are wrong"
    towers = [stack for stack in stacks if not set(stack) & set(called)] if nontext else []
    return executed_stacks(stacks, called) + towers, ""


def _overlap(one: str, other: str) -> bool:
    """Whether one of two modules is the other, or a part of it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _called(streamed: StreamedModel, amp: Amp, sample: Callable[[], Batch | None]) -> tuple[list[str], str]:
    """(blocks in the order of their calls, why there are none).

    An encoder-decoder that does not start from text (of speech, say) runs on a calibration sample. Elsewhere a sample's
    way leads through towers that are not text, and tells less than the module tree.
    """
    try:
        return called_blocks(streamed, streamed.blocks, amp), ""
    except Exception as error:  # whatever a model's forward may raise that is given text alone
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}"
    given = sample() if getattr(streamed.model.config, "is_encoder_decoder", False) else None
    try:
        return (called_blocks(streamed, streamed.blocks, amp, given) if given is not None else []), reason
    except Exception as error:  # the run itself will say what is wrong
        if is_out_of_memory(error):
            raise
        return [], reason


def plan_model(
    streamed: StreamedModel,
    stacks: Sequence[Sequence[str]],
    scheme: QuantizationScheme,
    layer_config: Mapping[str, Any] | None,
    ignore_layers: Sequence[str],
    quant_lm_head: bool,
    amp: Amp,
    gguf: str | None = None,
    chosen: Recipe | None = None,
) -> ModelPlan:
    """Decide every layer's scheme.

    Args:
        gguf: llama.cpp's file type whose mixture of tensor types is wanted. chosen: AutoScheme's choice.

    Raises:
        PlanError: rules that do not fit, or blocks of which too little can be quantized.
    """

    def matrices(names: Sequence[str]) -> Sequence[str]:
        try:
            return used_as_matrices(streamed, streamed.blocks, names, amp)
        except Exception as error:  # a model that cannot be run to see: then all of them count
            if is_out_of_memory(error):
                raise
            return names

    blocks = [name for stack in stacks for name in stack]
    routers = find_routers(streamed.model, blocks)
    fused = {parameter for group in streamed.names.groups.values() if group.fused for parameter in group.written}

    def source(layer: str) -> tuple[str, bool]:
        return stem_of(streamed, layer), f"{layer}.weight" in fused

    layers = find_layers(streamed.model, stacks, matrices, routers, source)
    if not gguf:
        layers += draft_layers(streamed, layers)
    embedding = find_embedding(streamed.model)
    if embedding is not None and (gguf or embedding.name in (layer_config or {})):
        layers.append(dataclasses.replace(embedding, stored=stem_of(streamed, embedding.name)))
    config = streamed.model.config
    mixture = recipe(gguf, layers, config) if gguf else chosen
    head = get_lm_head_name(streamed.model)
    beside = _matrices_beside(streamed, {info.name for info in layers}, routers)
    wanted = (layer_config, ignore_layers, head, quant_lm_head)
    return make_plan(layers, stacks, scheme, *wanted, beside, mixture, config)


def _matrices_beside(streamed: StreamedModel, layers: set[str], routers: Collection[str]) -> dict[str, str]:
    """Stored matrices that are no layers here but may be to other readers of the result: they stay floats."""
    found = {stem_of(streamed, name): "router: small, and it decides" for name in sorted(routers) if name not in layers}
    shapes = streamed.source_tensors()
    for name in streamed.names.unused:
        if name.endswith(".weight") and len(shapes[name].shape) == 2 and name.removesuffix(".weight") not in layers:
            found[name.removesuffix(".weight")] = "Transformers does not instantiate it"
    return found
