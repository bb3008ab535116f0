"""Quantizing blocks, one after the other: what calibration found goes in; codes in the store and a log come out.

A block that samples come through is worked on by all ranks together, with the run's algorithm; one that they do not
reach is rounded to nearest, by whichever rank it falls to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from auto_round.algorithms import algorithm
from auto_round.algorithms.base import BlockTask, put_weights
from auto_round.calibration.attention import attention_scales
from auto_round.calibration.block_io import BlockIO
from auto_round.calibration.forwards import Amp
from auto_round.compressors.backoff import MicroBatch, naming_the_lack
from auto_round.compressors.chain import Chain, LayerInputs, inputs_of
from auto_round.compressors.experts import expert_tokens, input_scales, rarely_used, shared_importance
from auto_round.compressors.together import keep, of_all_samples, recover
from auto_round.compressors.weights import check_finite, copy_weights, fused_maxima, restore_weights
from auto_round.data_type.base import QuantizedTensor
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import OUTSIDE, LayerPlan, ModelPlan
from auto_round.progress import RunProgress
from auto_round.ranks import Ranks
from auto_round.settings import AttentionSettings, TuneSettings
from auto_round.store import BlockResult, Store
from auto_round.tied import put_tied
from auto_round.wrapper import attach_inputs, attach_qparams, quantized_inputs

Scales = Mapping[str, torch.Tensor | None]


@dataclass(frozen=True)
class Learned:
    """What calibration found of a block; nothing of one that no sample reaches.

    micro: how many samples run at once. seen: layer name → what entered it, over the samples of all ranks.
    beside: tensors of no layer to store with the block, by parameter name. io: its activations; None where no sample
    comes through.
    """

    micro: MicroBatch
    seen: Mapping[str, LayerInputs] = field(default_factory=dict)
    beside: Mapping[str, torch.Tensor] = field(default_factory=dict)
    io: BlockIO | None = None


@dataclass(frozen=True)
class Way:
    """How the blocks of a run are quantized. algorithm: its name; amp: autocast context of a block's forward."""

    algorithm: str
    tune: TuneSettings
    attention: AttentionSettings
    amp: Amp


class Blocks:
    """Takes the blocks of a model through their quantization, one at a time.

    log: what became of each block that is done, as plain values.
    """

    def __init__(
        self, streamed: StreamedModel, plan: ModelPlan, store: Store, way: Way, ranks: Ranks, progress: RunProgress
    ):
        self._streamed, self._plan, self._store = streamed, plan, store
        self._way, self._ranks, self._progress = way, ranks, progress
        self.log: list[dict[str, Any]] = []

    # ---- the order of blocks -------------------------------------------------------------------------------------

    def follow(self, chain: Chain) -> None:
        """Quantize the blocks that the samples come through, at their first call.

        Raises:
            DoesNotFitError: memory is refused to a single sample. ValueError: a block gives NaN or Inf.
        """
        model = self._streamed.model
        originals: dict[str, dict[str, torch.Tensor]] = {}  # of blocks that are called again
        while chain.place is not None:
            block, _ = chain.place
            with naming_the_lack(f"quantizing {block}"), self._streamed.loaded(block) as module:
                if not self._streamed.is_streamed and block in chain.repeated:
                    restore_weights(module, originals.setdefault(block, copy_weights(module)))
                scales = self._visit(chain, module)
                put_tied(model, self._plan, self._store, block)
                with quantized_inputs(model, self._plan.quantized(block), scales):
                    chain.advance(module)

    def follow_none(self, blocks: Sequence[str]) -> None:
        """Round blocks that no sample reaches to nearest; the ranks share them."""
        for block in self._ranks.mine(dict.fromkeys(blocks, 1)):
            with naming_the_lack(f"quantizing {block}"), self._streamed.loaded(block) as module:
                self._quantize(block, module, Learned(MicroBatch(1, self._streamed.device)), Ranks())

    def _visit(self, chain: Chain, module: nn.Module) -> Scales:
        """Leave the block that all samples wait at with its quantized weights; gives the scales of its inputs."""
        block, turn = chain.place
        layers = self._plan.quantized(block)
        seen, beside = chain.observe(module, functools.partial(self._watch, block, turn))
        chain.witness(module)
        if turn == 0 and block in self._plan.block_names:
            seen = of_all_samples(seen, layers, self._ranks, self._streamed.device)
            self._ranks.max_(*beside.values())
            return self._quantize(block, module, Learned(chain.micro, seen, beside, chain.io()), self._ranks)
        tensors = self._store.load(block, layers, learned=False).tensors if layers else {}
        put_weights(module, block, tensors, layers)
        return _scales(tensors, layers)

    @contextlib.contextmanager
    def _watch(self, block: str, turn: int) -> Iterator[tuple[dict[str, LayerInputs], dict[str, torch.Tensor]]]:
        """While open, collect what enters the layers of a block at its first call, and the scales of its attention."""
        model, layers = self._streamed.model, self._plan.quantized(block) if turn == 0 else {}
        modules = {name: model.get_submodule(name) for name in layers}
        with inputs_of(modules) as seen, attention_scales(self._way.attention, model, block) as beside:
            yield seen, beside

    # ---- one block -----------------------------------------------------------------------------------------------

    def _quantize(self, block: str, module: nn.Module, learned: Learned, ranks: Ranks) -> Scales:
        """Find or recover a block's codes, and leave its weights dequantized where something comes after that runs it.

        ranks: those that work on it together.

        Returns:
            Layer name → the fixed scale of its input [1], for those that have one.
        """
        layers, number = self._plan.quantized(block), len(self.log)
        result = recover(self._store, block, layers, ranks)
        recovered = result is not None
        if result is None:
            result = keep(self._store, block, self._find(block, module, learned, ranks), layers, ranks)
        scales = _scales(result.tensors, layers)
        if learned.io is not None or not self._streamed.is_streamed:
            put_weights(module, block, result.tensors, layers)
        self.log.append(_entry(block, layers, result, recovered, learned))
        self._progress.block(number, block, _outcome(result, layers, recovered))
        return scales

    def _find(self, block: str, module: nn.Module, learned: Learned, ranks: Ranks) -> BlockResult:
        """Let the algorithm find a block's codes, with fewer samples at once where memory is refused."""
        layers, micro = self._plan.quantized(block), learned.micro
        check_finite(module, block, layers)
        scales = input_scales(layers, learned.seen)
        task = self._task(block, module, learned, ranks)
        run = algorithm(self._way.algorithm if learned.io is not None else "rtn")

        def begin(size: int) -> BlockResult:
            io = dataclasses.replace(task.io, micro=size) if task.io is not None else None
            return run(dataclasses.replace(task, io=io))

        with quantized_inputs(self._streamed.model, layers, scales):
            # Where several ranks add up what they find, one cannot begin again alone.
            result = micro.attempt(f"quantizing {block}", begin) if ranks.world == 1 else begin(micro.size)
        fixed = {name: dataclasses.replace(result.tensors[name], input_scale=scale) for name, scale in scales.items()}
        return dataclasses.replace(result, tensors={**result.tensors, **fixed}, beside=dict(learned.beside))

    def _task(self, block: str, module: nn.Module, learned: Learned, ranks: Ranks) -> BlockTask:
        layers, number, tune = self._plan.quantized(block), len(self.log), self._way.tune
        return BlockTask(
            name=block,
            module=module,
            layers=layers,
            settings=tune,
            seed=int.from_bytes(hashlib.sha256(f"{tune.seed}:{block}".encode()).digest()[:8], "big"),
            io=learned.io,
            importance=shared_importance(layers, learned.seen),
            fused_max=fused_maxima(module, block, layers),
            sparse=frozenset(rarely_used(layers, learned.seen)),
            amp=self._way.amp,
            on_step=lambda step, loss: self._progress.step(number, block, step, loss),
            ranks=ranks,
        )


def quantize_outside(model: nn.Module, plan: ModelPlan, store: Store, tune: TuneSettings, ranks: Ranks) -> None:
    """Layers outside the blocks (an lm_head): rounded to nearest with searched scales, by the main rank."""
    layers = plan.quantized(OUTSIDE)
    if layers and ranks.main and store.recover(OUTSIDE, layers) is None:
        check_finite(model, "", layers)
        task = BlockTask(name="", module=model, layers=layers, settings=tune, seed=tune.seed)
        store.save(OUTSIDE, algorithm("rtn")(task))
    ranks.barrier()


def put_quantized(streamed: StreamedModel, plan: ModelPlan, store: Store) -> None:
    """Load the whole model with its quantized weights, dequantized, in place."""
    for part in (part for part in plan.parts if part not in plan.drafts):
        layers, inside = plan.quantized(part), part != OUTSIDE
        module = streamed.load(part) if inside else streamed.model
        tensors = store.load(part, layers).tensors
        put_weights(module, part if inside else "", tensors, layers)
        attach_qparams(streamed.model, tensors, layers)
        attach_inputs(streamed.model, layers, {name: tensor.input_scale for name, tensor in tensors.items()})


def _scales(tensors: Mapping[str, QuantizedTensor], layers: Mapping[str, LayerPlan]) -> Scales:
    """Layer name → the fixed scale of its input [1], for those that have one."""
    return {name: tensors[name].input_scale for name, plan in layers.items() if plan.scheme.needs_input_range}


def _entry(
    block: str, layers: Mapping[str, LayerPlan], result: BlockResult, recovered: bool, learned: Learned
) -> dict[str, Any]:
    """What the report says of a block."""
    return {
        "name": block,
        "layers": len(layers),
        "start_loss": result.start_loss,
        "final_loss": result.final_loss,
        "losses": result.losses,
        "note": result.note,
        "resumed": recovered,
        "experts": expert_tokens(layers, learned.seen) if learned.io is not None else None,
        "work": dataclasses.asdict(result.work) if result.work is not None else None,
    }


def _outcome(result: BlockResult, layers: Mapping[str, LayerPlan], recovered: bool) -> str:
    text = f"quantized {len(layers)} layers"
    if recovered:
        return f"{text} (in an earlier run)"
    if result.start_loss is not None:
        text += f", loss {result.start_loss:.4g} -> {result.final_loss:.4g}"
    return f"{text}; {result.note}" if result.note else text
