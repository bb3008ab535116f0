"""The one place that knows the order of a run: load → adapt → plan → calibrate → tune → store → export → verify."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round import __version__
from auto_round.algorithms import algorithm
from auto_round.algorithms.base import BlockTask, put_weights
from auto_round.calibration.attention import attention_scales, check_attentions
from auto_round.calibration.block_io import Placement
from auto_round.calibration.feed import complete_sample, random_text
from auto_round.calibration.forwards import ReplayError
from auto_round.calibration.native import NativeRun, run_native
from auto_round.compressors.adapt import find_blocks, plan_model
from auto_round.compressors.afford import check_fits
from auto_round.compressors.chain import Chain, inputs_of
from auto_round.compressors.experts import FLOOR, expert_tokens, input_scales, rarely_used, shared_importance
from auto_round.compressors.samples import CHECK_SAMPLES, check_batch, read_samples
from auto_round.compressors.saving import folder_name, prepare_output, save
from auto_round.compressors.weights import (
    check_finite,
    copy_weights,
    first_bad_tensor,
    fused_maxima,
    hash_weights,
    restore_weights,
)
from auto_round.estimate import Estimate
from auto_round.formats import format_name, make_format
from auto_round.formats.base import ExportFormat
from auto_round.formats.engines import EngineProfile
from auto_round.formats.export import check_attention
from auto_round.logger import logger
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import OUTSIDE, LayerPlan, ModelPlan, PlanError
from auto_round.progress import RunProgress
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme
from auto_round.settings import AttentionSettings, CalibSettings, TuneSettings, describe
from auto_round.special_model_handler import _handle_special_model
from auto_round.store import BlockResult, Store
from auto_round.tied import put_tied, quantized_outside
from auto_round.utils.device import peak_memory_mb
from auto_round.utils.model import get_lm_head_name
from auto_round.wrapper import attach_inputs, attach_qparams, quantized_inputs

ACTIVATION_BUDGET = 16 << 20
"""Bytes of activations per chain kept in memory on a CPU; more go to a file, which the page cache holds as it can."""


class Compressor:
    """Quantizes one model. Made by `AutoRound(...)`; the steps can be called one by one or through `quantize()`.

    Attributes:
        model: the module (without weights in its blocks if it is streamed from a folder).
        plan: the decision for every layer. scheme, layer_config: what was asked for, resolved.
        warnings: what the report repeats at its end.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        tokenizer: Any,
        scheme: QuantizationScheme,
        tune: TuneSettings,
        calib: CalibSettings,
        *,
        attention: AttentionSettings | None = None,
        source_dir: Path | None = None,
        layer_config: Mapping[str, Any] | None = None,
        ignore_layers: Sequence[str] = (),
        to_quant_block_names: str | Sequence | None = None,
        quant_lm_head: bool = False,
        quant_nontext_module: bool = False,
        processor: Any = None,
        algorithm_name: str | None = None,
        activation_budget: int = ACTIVATION_BUDGET,
        show_progress: bool = True,
        trust_remote_code: bool = False,
        name: str = "model",
        gguf: str | None = None,
        target: EngineProfile | None = None,
    ):
        self.streamed, self.tokenizer, self.processor = streamed, tokenizer, processor
        self.source_dir = source_dir
        self.scheme, self.tune, self.calibration = scheme, tune, calib
        self.attention = attention or AttentionSettings()
        self.algorithm_name = algorithm_name or ("signround" if tune.iters else "rtn")
        self.activation_budget, self.show_progress = activation_budget, show_progress
        self.trust_remote_code, self.name = trust_remote_code, name
        self.default_format = "auto_round"
        self.report: dict[str, Any] = {}
        self.block_log: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.times: dict[str, float] = {}
        self.estimate: Estimate | None = None
        self.import_memory_mb = peak_memory_mb()
        self.model = _handle_special_model(streamed.model)
        self.data = None
        self.plan: ModelPlan | None = None
        stacks, note = find_blocks(streamed, to_quant_block_names, quant_nontext_module, self.amp, self._first_sample)
        self.warnings += [note] if note else []
        self._plan_again = functools.partial(
            plan_model, streamed, stacks, layer_config=layer_config, ignore_layers=ignore_layers, amp=self.amp
        )
        self._quant_lm_head, self.target = quant_lm_head, target
        self._make_plan(gguf)
        head = get_lm_head_name(self.model)
        if quant_lm_head and head is not None and self.plan.layers[head].info.tied:
            self.warnings.append(f"{head} stays as it is: {self.plan.layers[head].reason}")
        self.native: NativeRun | None = None
        self._chain: Chain | None = None
        self._store: Store | None = None
        self._input_scales: Mapping[str, torch.Tensor | None] = {}  # of the layers of the block last quantized

    def _make_plan(self, gguf: str | None) -> None:
        """Decide every layer's scheme. gguf: llama.cpp's file type whose mixture of tensor types is wanted."""
        self.gguf = gguf
        self.plan = self._plan_again(scheme=self.scheme, quant_lm_head=self._quant_lm_head, gguf=gguf)
        if self.target is not None:
            self.plan, notes = self.target.repair(self.plan)
            self.warnings += notes

    def _bind(self, name: str) -> ExportFormat:
        """A format for this run's plan; before the run, a GGUF file type brings its mixture if no scheme was asked for.

        Raises:
            PlanError: there is no such format, it cannot hold the plan, or the engine it is for cannot load it.
        """
        known = format_name(name)
        kind = known.removeprefix("gguf:").upper()
        fresh = self._store is None and self.gguf is None and self.scheme == PRESET_SCHEMES["W4A16"]
        if known.startswith("gguf:") and fresh:
            self.scheme = PRESET_SCHEMES[f"GGUF:{kind}"]
            self._make_plan(kind)
        fmt = make_format(known, self.plan)
        problems = self.target.problems(self.plan, known) if self.target is not None else []
        if problems:
            raise PlanError("; ".join(problems))
        check_attention(fmt, self.attention.asked())
        return fmt

    def _first_sample(self) -> dict[str, torch.Tensor] | None:
        """A calibration sample, where the samples came ready."""
        if self.calibration.dataset is None or isinstance(self.calibration.dataset, str):
            return None
        self.load_data()
        return self.samples[0]

    # ---- attributes people read ------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.streamed.device

    @property
    def iters(self) -> int:
        return self.tune.iters

    @property
    def bits(self) -> int:
        return self.scheme.bits

    @property
    def group_size(self) -> int:
        return self.scheme.group_size

    @property
    def sym(self) -> bool:
        return self.scheme.sym

    @property
    def layer_config(self) -> dict[str, dict[str, Any]]:
        """Layer name → scheme fields and `in_blocks`, for layers in blocks and those quantized outside them."""
        return {
            name: {**plan.scheme.to_dict(), "in_blocks": plan.info.block is not None, "reason": plan.reason}
            for name, plan in self.plan.layers.items()
            if plan.info.block is not None or plan.is_quantized
        }

    @property
    def needs_data(self) -> bool:
        """Whether the run learns from calibration samples: to tune, to search scales, or to fix those of inputs.

        Inputs are those of layers and those of attention.
        """
        layers = self.plan.quantized() if self.plan is not None else {}
        schemes = (self.scheme, *(layer.scheme for layer in layers.values()))
        return (
            self.tune.needs_data or bool(self.attention.scaled) or any(scheme.needs_input_range for scheme in schemes)
        )

    def amp(self):
        """The context in which blocks run: half-precision matrix products for models stored wider."""
        dtype = getattr(self.model, "dtype", torch.float32)
        slow = dtype == torch.float32 or (dtype == torch.float16 and self.device.type == "cpu")
        if self.tune.amp and slow:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    # ---- calibrate -------------------------------------------------------------------------------------------

    def load_data(self) -> None:
        """Read the calibration text, and the text on which original and result are compared at the end."""
        if self.data is None:
            self.data = read_samples(
                self.calibration,
                self.model,
                self.tokenizer,
                self.processor,
                self.source_dir,
                nsamples=self.calibration.nsamples if self.needs_data else 1,
                seed=self.tune.seed,
                trust_remote_code=self.trust_remote_code,
            )
            self.warnings.extend(self.data.notes)

    @property
    def samples(self) -> list[dict[str, torch.Tensor]]:
        """Calibration samples as the model takes them."""
        return [complete_sample(self.model, sample) for sample in self.data.samples]

    def _check_batch(self) -> dict[str, torch.Tensor]:
        if self.tokenizer is None and self.data is None and not self.needs_data:
            return random_text(self.model, CHECK_SAMPLES, 32, self.tune.seed)
        self.load_data()
        return check_batch(self.model, self.data)

    def observe_original(self) -> NativeRun:
        """Run the original once on the check batch: what the artifact will be compared with.

        Raises:
            ReplayError: a block called on its own does not compute what it computes in the model's forward.
        """
        if self.native is None:
            self.native = self._run_native(self._check_batch())
            self.streamed.forget_originals()
            if not torch.isfinite(self.native.logits).all():
                reason = first_bad_tensor(self.streamed, self.plan.block_names)
                raise ValueError(f"the original model gives logits that are not finite: {reason}")
            self._note_native()
        return self.native

    def _run_native(self, batch: Mapping[str, torch.Tensor]) -> NativeRun:
        """The original's forward; in the dtype it is stored in where its code cannot run in half precision."""
        try:
            return run_native(self.streamed, self.streamed.blocks, batch, self.amp)
        except RuntimeError as error:
            if isinstance(error, ReplayError) or not self._autocasts:
                raise
            self.tune = dataclasses.replace(self.tune, amp=False)
            self.warnings.append(f"blocks run in the stored dtype: in bfloat16 the model's forward fails ({error})")
            return run_native(self.streamed, self.streamed.blocks, batch, self.amp)

    @property
    def _autocasts(self) -> bool:
        return not isinstance(self.amp(), contextlib.nullcontext)

    def _note_native(self) -> None:
        missed = [block for block in self.plan.block_names if block not in self.native.blocks]
        if missed:
            self.warnings.append(
                f"{len(missed)} blocks ({missed[0]} …) are not reached by the calibration text: they are rounded to "
                "nearest with searched scales"
            )
        alone = {block: joint.reason for (block, _), joint in self.native.joints.items() if not joint.joins}
        if alone and len(self.native.batch) and next(iter(self.native.batch.values())).shape[0] > 1:
            block, reason = next(iter(alone.items()))
            logger.info("samples pass one by one through %d blocks (%s: %s)", len(alone), block, reason)

    def calib(self, nsamples: int | None = None, bs: int | None = None) -> None:
        """Record what the model passes to its blocks, for every calibration sample.

        Raises:
            ReplayError: a block cannot be replayed alone; the message names it and the argument.
        """
        if nsamples is not None:
            self.calibration = dataclasses.replace(self.calibration, nsamples=nsamples)
        began = time.monotonic()
        self.load_data()
        native = self.observe_original()
        check_attentions(
            self.model, self.attention, [call for call in native.places if call[0] in self.plan.block_names]
        )
        if self._store is None:
            self._open_store(None)
        if self._chain is not None:
            self._chain.close()
        self._quantize_outside(self._store)  # first, so that the blocks are tuned behind a quantized embedding
        self._chain = Chain(
            self.model,
            native,
            self.samples,
            self._placement(),
            self.amp,
            self.tune.batch_size,
            self.tune.enable_quanted_input,
            functools.partial(quantized_outside, self.model, self.plan, self._store),
        )
        self.times["calibrate"] = time.monotonic() - began

    # ---- tune ------------------------------------------------------------------------------------------------

    def _quantize_blocks(self) -> None:
        """Quantize every block in order into the store, continuing where an earlier run stopped."""
        store = self._store or self._open_store(None)
        began = time.monotonic()
        resumed = sum(store.has(block) for block in self.plan.block_names)
        if resumed:
            logger.info("continuing an earlier run: %d of %d blocks are done", resumed, len(self.plan.block_names))
        try:
            with RunProgress(len(self.plan.block_names), self.tune.iters, self.show_progress) as progress:
                done = self._follow_chain(store, progress) if self._chain is not None else []
                for block in self.plan.block_names:
                    if block not in done:
                        with self.streamed.loaded(block) as module:
                            self._quantize_block(block, module, store, progress)
                self._quantize_outside(store)
            logger.info(self.plan.summary())
            self._note_experts()
        finally:
            if self._chain is not None:
                self._chain.close()
                self._chain = None
        self.times["tune"] = time.monotonic() - began

    def _note_experts(self) -> None:
        """Say how many experts the calibration text hardly reached."""
        seen = [block["experts"] for block in self.block_log if block.get("experts")]
        rare, total = sum(one["below_floor"] for one in seen), sum(one["experts"] for one in seen)
        if rare:
            self.warnings.append(
                f"{rare} of {total} experts got fewer than {FLOOR} calibration tokens: they are rounded with scales "
                "searched on what all experts of their block are given; more samples (nsamples) reach more of them"
            )

    def _follow_chain(self, store: Store, progress) -> list[str]:
        """Quantize the blocks that the samples come through, at their first call; returns their names."""
        chain, done = self._chain, []
        originals: dict[str, dict[str, torch.Tensor]] = {}  # of blocks that are called again
        often = {block for block, turn in self.native.places if turn}
        while chain.place is not None:
            block, turn = chain.place
            with self.streamed.loaded(block) as module:
                if not self.streamed.is_streamed and block in often:
                    restore_weights(module, originals.setdefault(block, copy_weights(module)))
                modules = {name: self.model.get_submodule(name) for name in self.plan.quantized(block)}
                watching = attention_scales(self.attention, self.model, block)
                with inputs_of(modules if turn == 0 else {}) as seen, watching as beside:
                    chain.observe(module)
                layers = self.plan.quantized(block)
                if turn == 0 and block in self.plan.block_names:
                    self._quantize_block(block, module, store, progress, seen, beside)
                    done.append(block)
                elif layers:
                    put_weights(module, block, store.load(block, layers).tensors, layers)
                put_tied(self.model, self.plan, store, block)
                with quantized_inputs(self.model, layers, self._input_scales):
                    chain.advance(module)
        return done

    def _placement(self) -> Placement:
        return Placement(self.device, self.activation_budget, self._store.folder)

    def _quantize_block(self, block: str, module: nn.Module, store: Store, progress, seen=None, beside=None) -> None:
        """Find or recover a block's codes, and leave its weights dequantized.

        seen: what entered its layers, if samples come through the block; without, it is rounded to nearest.
        beside: what else calibration found in the block, by name.
        """
        layers = self.plan.quantized(block)
        number = len(self.block_log)
        result = store.recover(block, layers)
        recovered = result is not None
        if result is None:
            result = self._run_algorithm(number, block, module, layers, seen, progress)
            store.save(block, dataclasses.replace(result, beside=beside or {}))
        self._input_scales = {name: tensor.input_scale for name, tensor in result.tensors.items()}
        if seen is not None or not self.streamed.is_streamed:
            put_weights(module, block, result.tensors, layers)
        self.block_log.append(
            {
                "name": block,
                "layers": len(layers),
                "start_loss": result.start_loss,
                "final_loss": result.final_loss,
                "losses": result.losses,
                "note": result.note,
                "resumed": recovered,
                "experts": expert_tokens(layers, seen) if seen is not None else None,
            }
        )
        progress.block(number, block, _outcome(result, layers, recovered))

    def _run_algorithm(self, number, block, module, layers, seen, progress) -> BlockResult:
        check_finite(module, block, layers)
        scales = input_scales(layers, seen or {})
        task = BlockTask(
            name=block,
            module=module,
            layers=layers,
            settings=self.tune,
            seed=int.from_bytes(hashlib.sha256(f"{self.tune.seed}:{block}".encode()).digest()[:8], "big"),
            io=self._chain.io() if seen is not None else None,
            importance=shared_importance(layers, seen or {}),
            fused_max=fused_maxima(module, block, layers),
            sparse=frozenset(rarely_used(layers, seen)) if seen is not None else frozenset(),
            amp=self.amp,
            on_step=lambda step, loss: progress.step(number, block, step, loss),
        )
        with quantized_inputs(self.model, layers, scales):
            result = algorithm(self.algorithm_name if seen is not None else "rtn")(task)
        fixed = {name: dataclasses.replace(result.tensors[name], input_scale=scale) for name, scale in scales.items()}
        return dataclasses.replace(result, tensors={**result.tensors, **fixed})

    def _quantize_outside(self, store: Store) -> None:
        """Layers outside the blocks (an lm_head): rounded to nearest with searched scales."""
        layers = self.plan.quantized(OUTSIDE)
        if not layers or store.has(OUTSIDE):
            return
        task = BlockTask(name="", module=self.model, layers=layers, settings=self.tune, seed=self.tune.seed)
        store.save(OUTSIDE, algorithm("rtn")(task))

    # ---- the public calls ------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Everything that the codes depend on, as far as it is known without running the model."""
        from importlib.metadata import version

        source = self.streamed.checkpoint.fingerprint() if self.streamed.is_streamed else hash_weights(self.model)
        return {
            "source": source,
            "source_dir": str(self.source_dir or ""),
            "algorithm": self.algorithm_name,
            "settings": {**describe(self.tune), "iters": self.tune.iters, "seed": self.tune.seed},
            "attention": self.attention.asked(),
            "data": self.data.sha256 if self.data is not None and self.needs_data else None,
            "scheme": self.scheme.to_dict(),
            "layers": {name: plan.scheme.to_dict() for name, plan in self.plan.quantized().items()},
            "blocks": [list(stack) for stack in self.plan.blocks],
            "device": self.device.type,
            "auto_round": __version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
        }

    def _open_store(self, root: Path | None) -> Store:
        if self.needs_data:
            self.load_data()
        if root is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="auto_round_")
            root = Path(self._temporary.name)
        self._store = Store(root, self.facts())
        return self._store

    def run(self, work: Path | None = None) -> Store:
        """Everything up to the store: calibrate where the algorithm needs it, then quantize every block."""
        store = self._store if self._store is not None and work is None else self._open_store(work)
        if self.needs_data:
            self.calib()
        else:
            self.observe_original()
        self._quantize_blocks()
        return store

    def quantize(self) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
        """Quantize; returns the model with dequantized weights in place, and what was decided for each layer."""
        store = self.run()
        self.put_quantized(store)
        return self.model, self.layer_config

    def put_quantized(self, store: Store) -> None:
        """Load the whole model with its quantized weights, dequantized, in place."""
        for part in self.plan.parts:
            layers = self.plan.quantized(part)
            inside = part != OUTSIDE
            module = self.streamed.load(part) if inside else self.model
            tensors = store.load(part, layers).tensors
            put_weights(module, part if inside else "", tensors, layers)
            attach_qparams(self.model, tensors, layers)
            attach_inputs(self.model, layers, {name: tensor.input_scale for name, tensor in tensors.items()})

    def save_quantized(
        self,
        output_dir: str | Path,
        format: str | None = None,
        inplace: bool = True,
        return_folders: bool = False,
        max_shard_size: int | str | None = None,
    ) -> Any:
        """Write the model after `quantize()`, straight into `output_dir`; returns the model, or (model, folder).

        inplace: accepted for compatibility; what is written comes from the store, not from the model in memory.
        """
        if self._store is None:
            raise RuntimeError("save_quantized() writes what quantize() found: call quantize() first")
        fmt = self._bind(format or self.default_format)
        folder = save(self, self._store, fmt, Path(output_dir), max_shard_size)
        return (self.model, str(folder)) if return_folders else self.model

    def quantize_and_save(
        self,
        output_dir: str | Path = "tmp_autoround",
        format: str | None = None,
        inplace: bool = True,
        max_shard_size: int | str | None = None,
        force: bool = False,
    ) -> tuple[nn.Module, str | list[str]]:
        """Quantize into a work folder under `output_dir`, write the model there in each format, and verify it.

        A killed run goes on from its last complete block when it is started again with the same arguments.
        Before any work it is refused with DoesNotFitError or OSError if memory or disk will not do, unless `force`.

        inplace is accepted for compatibility and changes nothing.

        Returns:
            (model, folder), or a list of folders for several formats. A model streamed from a folder comes back
            without its weights; load the written one.
        """
        formats = [self._bind(name) for name in (format or self.default_format).split(",")]
        base = Path(output_dir).expanduser() / folder_name(self.name, self.scheme, self.gguf is not None)
        prepare_output(base)
        self.estimate = check_fits(self, formats, base, force)
        finals = [base if len(formats) == 1 else base / fmt.name.replace(":", "-").replace("_", "-") for fmt in formats]
        with contextlib.closing(self._open_store(base.with_name(base.name + ".work"))) as store:
            self.run()
            folders = [
                str(save(self, store, fmt, final, max_shard_size)) for fmt, final in zip(formats, finals, strict=True)
            ]
            if not self.streamed.is_streamed:
                self.put_quantized(store)
        return self.model, folders[0] if len(folders) == 1 else folders


def _outcome(result: BlockResult, layers: Mapping[str, LayerPlan], recovered: bool) -> str:
    text = f"quantized {len(layers)} layers"
    if recovered:
        return f"{text} (in an earlier run)"
    if result.start_loss is not None:
        text += f", loss {result.start_loss:.4g} -> {result.final_loss:.4g}"
    return f"{text}; {result.note}" if result.note else text
