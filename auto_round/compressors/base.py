"""The one place that knows the order of a run: load → adapt → plan → calibrate → tune → store → export → verify."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.auto_scheme.choose import choose_schemes
from auto_round.budget import Working
from auto_round.calibration.attention import check_attentions
from auto_round.calibration.block_io import Placement
from auto_round.calibration.cpu_attention import QuickAttention
from auto_round.calibration.cpu_linear import EvenRows
from auto_round.calibration.feed import complete_sample, random_text
from auto_round.calibration.forwards import ReplayError
from auto_round.calibration.native import NativeRun, mapped, run_native
from auto_round.command import command_line
from auto_round.compressors import minutes, notes
from auto_round.compressors.adapt import Planner, Recipe
from auto_round.compressors.afford import check_fits, output_sizes
from auto_round.compressors.backoff import naming_the_lack
from auto_round.compressors.blocks import Blocks, Way, put_quantized, quantize_outside
from auto_round.compressors.chain import Chain
from auto_round.compressors.choose import choose_for
from auto_round.compressors.distill import train_scales
from auto_round.compressors.drafts import quantize_drafts
from auto_round.compressors.facts import facts_of
from auto_round.compressors.own_text import own_text
from auto_round.compressors.request import Request, Source
from auto_round.compressors.samples import CHECK_SAMPLES, check_batch, read_samples
from auto_round.compressors.saving import folder_name, format_folders, prepare_output, save
from auto_round.compressors.together import all_notes, open_store, temporary_root
from auto_round.compressors.topup import candidates, topped_up
from auto_round.compressors.weights import first_bad_tensor
from auto_round.estimate import Estimate
from auto_round.formats import format_name, make_format
from auto_round.formats.base import ExportFormat
from auto_round.formats.export import check_attention
from auto_round.logger import logger
from auto_round.plan import ModelPlan, PlanError
from auto_round.progress import RunProgress
from auto_round.ranks import Ranks
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme
from auto_round.settings import CalibSettings, TuneSettings
from auto_round.special_model_handler import _handle_special_model
from auto_round.speed import Speed
from auto_round.store import Store
from auto_round.tied import quantized_outside
from auto_round.utils.common import all_finite
from auto_round.utils.device import is_out_of_memory, peak_memory_mb
from auto_round.utils.model import get_lm_head_name
from auto_round.workload import Workload, expert_spread


class Compressor:
    """Quantizes one model. Made by `AutoRound(...)`; the steps can be called one by one or through `quantize()`.

    Attributes:
        model: the module (without weights in its blocks if it is streamed from a folder).
        plan: the decision for every layer. scheme, layer_config: what was asked for, resolved.
        store: the work folder; None before there is one.
        warnings: what the report repeats at its end.
        ranks: the processes that work on the run together; each makes one of these, with the same arguments.
    """

    def __init__(self, source: Source, request: Request, ranks: Ranks | None = None, store: Store | None = None):
        self.ranks = ranks or Ranks()
        self.store = store
        self.streamed, self.tokenizer, self.processor = source.streamed, source.tokenizer, source.processor
        self.source_dir, self.name = source.directory, source.name
        self.scheme, self.tune, self.calibration = request.scheme, request.tune, request.calib
        self.attention, self.budget, self.target = request.attention, request.budget, request.target
        self.auto, self.choice = request.auto, None
        self.minutes, self.pick = request.minutes, None
        self._learner = request.algorithm_name
        self.algorithm_name, self.default_format = request.algorithm_name, request.default_format
        self.trust_remote_code = request.trust_remote_code
        self.show_progress = request.show_progress and self.ranks.main
        self.report: dict[str, Any] = {}
        self.block_log: list[dict[str, Any]] = []
        self.scale_log: list[tuple[int, float]] = []
        self.warnings: list[str] = []
        self.times: dict[str, float] = {}
        self.estimate: Estimate | None = None
        self.tuning_rate: dict[str, float] | None = None
        self.workloads: list[tuple[tuple, Workload]] = []  # what they were counted for, and they
        self.speeds: dict[tuple, Speed] = {}  # this machine's, by what kind of work it was measured for
        self.import_memory_mb = peak_memory_mb()
        self.model = _handle_special_model(self.streamed.model)
        self.data = None
        self.native: NativeRun | None = None
        self.plan: ModelPlan | None = None
        self._asked = request.asked
        self._chain: Chain | None = None
        self._planner = Planner(self.streamed, request, self.amp, self._first_sample)
        self.warnings += self._planner.notes
        self._make_plan(request.scheme, request.gguf)
        head = get_lm_head_name(self.model) if request.quant_lm_head else None
        self.warnings += notes.unquantized_head(self.plan.layers[head] if head is not None else None)

    def _make_plan(self, scheme: QuantizationScheme, gguf: str | None, chosen: Recipe | None = None) -> None:
        self.scheme, self.gguf = scheme, gguf
        self.plan, repairs = self._planner.plan(scheme, gguf, chosen)
        self.warnings += repairs

    def choose_schemes(self, fmt: ExportFormat | None = None, root: Path | None = None) -> None:
        """Choose each layer's scheme where there are several to choose from; see `auto_scheme.choose`."""
        if self.auto is not None and self.choice is None:
            began = time.monotonic()
            self.choice = choose_schemes(self, fmt or self.bind(self.default_format), root)
            self._make_plan(self.choice.common, None, self.choice.recipe)
            vars(self).pop("working", None)  # a run that goes on has not looked at memory before it has this plan
            self.warnings += self.choice.notes
            self.times["choose"] = time.monotonic() - began

    def retune(self, tune: TuneSettings) -> None:
        """Take other settings of tuning, as long as nothing was done by the old ones."""
        self.tune, self.algorithm_name = tune, self._learner if tune.iters else "rtn"
        vars(self).pop("working", None)

    def take_pick(self, pick: minutes.Pick) -> None:
        """Remember what was picked for a budget of minutes; the line that repeats the run names it instead."""
        self.pick = pick
        if self._asked is not None:
            kept = {name: value for name, value in self._asked.items() if name != "minutes"}
            self._asked = kept | pick.point.arguments()

    def bind(self, name: str) -> ExportFormat:
        """A format for this run's plan; before the run, a GGUF file type brings its mixture if no scheme was asked for.

        Raises:
            PlanError: there is no such format, it cannot hold the plan, or the engine it is for cannot load it.
        """
        known = format_name(name)
        kind = known.removeprefix("gguf:").upper()
        fresh = self.store is None and self.gguf is None and self.scheme == PRESET_SCHEMES["W4A16"]
        fresh = fresh and self.auto is None
        if known.startswith("gguf:") and fresh:
            self._make_plan(PRESET_SCHEMES[f"GGUF:{kind}"], kind)
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

    @functools.cached_property
    def working(self) -> Working:
        """How the run uses memory: chosen once, from its settings and its budget."""
        return choose_for(self)

    @contextlib.contextmanager
    def amp(self) -> Iterator[None]:
        """The context in which blocks run: half precision for models stored wider, and what is quick on a CPU."""
        with contextlib.ExitStack() as context:
            if self.device.type == "cpu":
                context.enter_context(QuickAttention())
                context.enter_context(EvenRows())
            if self.autocasts:
                context.enter_context(torch.autocast(self.device.type, dtype=torch.bfloat16))
            yield

    # ---- calibrate -------------------------------------------------------------------------------------------

    def load_data(self, kept: Path | None = None) -> None:
        """Read the calibration text, and the text on which original and result are compared at the end.

        kept: the folder that keeps text which the model has to write first; None for none.
        """
        if self.data is None:
            self.data = self.read(self.calibration, candidates(self), kept)
            self.warnings.extend(self.data.notes)

    def read(self, wanted: CalibSettings, nsamples: int, kept: Path | None = None) -> Any:
        """So many calibration samples, and held-out ones. kept: see `load_data`."""
        return read_samples(
            wanted,
            self.model,
            self.tokenizer,
            self.processor,
            self.source_dir,
            nsamples=nsamples,
            seed=self.tune.seed,
            trust_remote_code=self.trust_remote_code,
            own_text=functools.partial(own_text, self, kept),
        )

    @property
    def samples(self) -> list[dict[str, torch.Tensor]]:
        """Calibration samples as the model takes them, those of all ranks."""
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
            with naming_the_lack("running the original on the check batch"):
                self.native = self._run_native(self._check_batch())
            self.streamed.forget_originals()
            if not all_finite(self.native.logits):
                reason = first_bad_tensor(self.streamed, self.plan.block_names, self.native.first_not_finite())
                raise ValueError(f"the original model gives logits that are not finite: {reason}")
            if self.working.logits == "file" and self.store is not None:
                self.native.logits = mapped(self.native.logits, self.store.scratch("logits.activations"))
            self.warnings += notes.unreached_blocks(self.plan, self.native)
            notes.log_samples_alone(self.native)
        return self.native

    def _run_native(self, batch: Mapping[str, torch.Tensor]) -> NativeRun:
        """The original's forward; in the dtype it is stored in where its code cannot run in half precision."""
        try:
            return run_native(self.streamed, self.streamed.blocks, batch, self.amp)
        except RuntimeError as error:
            if isinstance(error, ReplayError) or is_out_of_memory(error) or not self.autocasts:
                raise
            self.tune = dataclasses.replace(self.tune, amp=False)
            self.warnings.append(f"blocks run in the stored dtype: in bfloat16 the model's forward fails ({error})")
            return run_native(self.streamed, self.streamed.blocks, batch, self.amp)

    @property
    def autocasts(self) -> bool:
        """Whether blocks run in bfloat16 although the model is stored otherwise."""
        dtype = getattr(self.model, "dtype", torch.float32)
        slow = dtype == torch.float32 or (dtype == torch.float16 and self.device.type == "cpu")
        return self.tune.amp and slow

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
        if self.store is None:
            self._open_store(None)
        self._close_chain()
        self.data = topped_up(self)
        self._quantize_outside(self.store)  # first, so that the blocks are tuned behind a quantized embedding
        self._chain = Chain(
            self.model,
            native,
            self.own_samples(),
            self.placement(),
            self.amp,
            self.tune.batch_size,
            self.tune.enable_quanted_input and self.tune.iters > 0,
            functools.partial(quantized_outside, self.model, self.plan, self.store),
            self.working,
            self.note,
            expert_spread(self.plan, getattr(self.model, "config", None)),
        )
        self.times["calibrate"] = time.monotonic() - began

    def own_samples(self) -> list[dict[str, torch.Tensor]]:
        """Those that this rank follows."""
        samples = self.samples
        size = self.ranks.step_size(self.tune.samples_per_step, len(samples))
        return [samples[index] for index in self.ranks.share(len(samples), size)]

    # ---- tune ------------------------------------------------------------------------------------------------

    def quantize_blocks(self) -> None:
        """Quantize every block in order into the store, continuing where an earlier run stopped."""
        store, names = self.store or self._open_store(None), self.plan.block_names
        began = time.monotonic()
        resumed = sum(store.has(block) for block in names)
        if resumed:
            logger.info("continuing an earlier run: %d of %d blocks are done", resumed, len(names))
        way = Way(self.algorithm_name, self.tune, self.attention, self.amp)
        try:
            with RunProgress(len(names), self.tune.iters, self.show_progress) as progress:
                blocks = Blocks(self.streamed, self.plan, store, way, self.ranks, progress)
                self.block_log = blocks.log
                if self._chain is not None:
                    blocks.follow(self._chain)
                done = {entry["name"] for entry in blocks.log}
                blocks.follow_none([block for block in names if block not in done])
                self._quantize_outside(store)
                quantize_drafts(self.streamed, self.plan, store, self.tune, self.ranks)
        finally:
            self._close_chain()
        self.block_log, self.warnings = all_notes(blocks.log, self.warnings, names, self.ranks)
        logger.info(self.plan.summary())
        self.warnings += notes.rare_experts(self.block_log)
        dtype = torch.bfloat16 if self.autocasts else getattr(self.model, "dtype", torch.float32)
        self.tuning_rate = notes.tuning_rate(self.block_log, self.device, dtype)
        self.times["tune"] = time.monotonic() - began
        if self.tune.scale_iters:
            train_scales(self)

    _quantize_blocks = quantize_blocks  # the name that tests of single models call it by

    def _quantize_outside(self, store: Store) -> None:
        quantize_outside(self.model, self.plan, store, self.tune, self.ranks)

    def _close_chain(self) -> None:
        if self._chain is not None:
            self._chain.close()
            self._chain = None

    def placement(self) -> Placement:
        """Where samples wait between blocks."""
        prefix = f"rank{self.ranks.rank}-" if self.ranks.rank else ""
        return Placement(self.device, self.working.keep, self.store.folder, prefix)

    def note(self, text: str) -> None:
        """Say something that a person should know, now and in the report."""
        logger.warning(text)
        self.warnings.append(text)

    # ---- the public calls ------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Everything that the codes depend on, as far as it is known without running the model."""
        return facts_of(self)

    def _open_store(self, root: Path | None) -> Store:
        minutes.settle(self, {}, root.parent if root is not None else None, root)
        if self.needs_data:
            self.load_data(root)
        if root is None:
            root, self._temporary = temporary_root(self.ranks)
        self.store = open_store(root, self.facts(), self.ranks)
        if self.ranks.main:
            minutes.keep(self.pick, root)
        return self.store

    def run(self, work: Path | None = None) -> Store:
        """Everything up to the store: calibrate where the algorithm needs it, then quantize every block."""
        self.choose_schemes()
        store = self.store if self.store is not None and work is None else self._open_store(work)
        if self.needs_data:
            self.calib()
        else:
            self.observe_original()
        self.quantize_blocks()
        return store

    def quantize(self) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
        """Quantize; returns the model with dequantized weights in place, and what was decided for each layer."""
        store = self.run()
        self.put_quantized(store)
        return self.model, self.layer_config

    def put_quantized(self, store: Store) -> None:
        """Load the whole model with its quantized weights, dequantized, in place."""
        put_quantized(self.streamed, self.plan, store)

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
        if self.store is None:
            raise RuntimeError("save_quantized() writes what quantize() found: call quantize() first")
        fmt = self.bind(format or self.default_format)
        final = Path(output_dir).expanduser().resolve()
        if self.ranks.main:
            prepare_output(final, self.source_dir)
        folder = self._save(fmt, final, max_shard_size)
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
        formats = [self.bind(name) for name in (format or self.default_format).split(",")]
        output = Path(output_dir).expanduser().absolute()
        label = self.auto.label if self.auto is not None else None
        base = (output / folder_name(self.name, self.scheme, self.gguf is not None, label)).resolve()
        work = base.with_name(base.name + ".work")
        finals = format_folders(base, formats)
        if self.ranks.main:
            for final in finals:
                prepare_output(final, self.source_dir)
        self.choose_schemes(formats[0], work)
        formats = [self.bind(fmt.name) for fmt in formats]
        minutes.settle(self, output_sizes(self, formats) if self.minutes else {}, work.parent, work)
        if self.ranks.main:
            with naming_the_lack("estimating what the run needs"):
                self.estimate = check_fits(self, formats, base, force)
        command = command_line(self._asked, output, [fmt.name for fmt in formats], max_shard_size, force)
        with contextlib.closing(self._open_store(work)) as store:
            self.run()
            with naming_the_lack("writing and verifying the result"):
                pairs = zip(formats, finals, strict=True)
                folders = [str(self._save(fmt, final, max_shard_size, command)) for fmt, final in pairs]
            if not self.streamed.is_streamed:
                self.put_quantized(store)
        return self.model, folders[0] if len(folders) == 1 else folders

    def _save(self, fmt: ExportFormat, final: Path, max_shard_size: Any, command: str | None = None) -> Path:
        """Write and verify a folder, which the main rank does; the others wait, so that it is there for all."""
        if self.ranks.main:
            save(self, self.store, fmt, final, max_shard_size, command)
        self.ranks.barrier()
        return final
