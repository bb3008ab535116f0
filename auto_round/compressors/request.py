"""What a run is given: a model with what belongs to it, and what was asked for, sorted out and checked.

`AutoRound` and `export_work` make these from their arguments, so that nothing after them knows an argument's old name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auto_round.auto_scheme import AutoScheme
from auto_round.budget import Budget
from auto_round.formats.engines import EngineProfile
from auto_round.modeling.streaming import StreamedModel
from auto_round.schemes import QuantizationScheme
from auto_round.settings import AttentionSettings, CalibSettings, TuneSettings


@dataclass(frozen=True)
class Source:
    """The model to quantize.

    tokenizer, processor: None where there are none. directory: its folder; None for a model that came as an object.
    name: what output folders are called after.
    """

    streamed: StreamedModel
    tokenizer: Any = None
    processor: Any = None
    directory: Path | None = None
    name: str = "model"


@dataclass(frozen=True)
class Request:
    """What to do with it.

    layer_config: layer name or pattern → scheme, for layers that differ from `scheme`; ignore_layers: those that stay.
    blocks: names of the blocks to quantize; None for those that are found.
    algorithm: its name; None for the usual one.
    gguf: llama.cpp's file type whose mixture of tensor types is wanted. target: the engine that is to load the result.
    auto: schemes to choose from for each layer; `scheme` stands for all until they are chosen.
    format: what to save as unless told otherwise; None for what suits scheme and engine.
    minutes: of wall time, for which the best settings of tuning are picked; None for those of `tune`.
    asked: arguments of `AutoRound` as they were given, for the command that repeats the run; None if there were none.
    """

    scheme: QuantizationScheme
    tune: TuneSettings = field(default_factory=TuneSettings)
    calib: CalibSettings = field(default_factory=CalibSettings)
    attention: AttentionSettings = field(default_factory=AttentionSettings)
    budget: Budget = field(default_factory=Budget)
    layer_config: Mapping[str, Any] | None = None
    ignore_layers: Sequence[str] = ()
    blocks: str | Sequence | None = None
    quant_lm_head: bool = False
    quant_nontext_module: bool = False
    algorithm: str | None = None
    gguf: str | None = None
    target: EngineProfile | None = None
    auto: AutoScheme | None = None
    minutes: float | None = None
    format: str | None = None
    trust_remote_code: bool = False
    show_progress: bool = True
    asked: Mapping[str, Any] | None = None

    @property
    def needs_data(self) -> bool:
        """Whether the run learns from calibration samples, as far as it is known before there is a plan."""
        learns = self.tune.needs_data or bool(self.attention.scaled) or self.auto is not None
        return learns or self.scheme.needs_input_range

    @property
    def algorithm_name(self) -> str:
        return self.algorithm or ("signround" if self.tune.iters else "rtn")

    @property
    def default_format(self) -> str:
        if self.format:
            return self.format
        if self.gguf:
            return f"gguf:{self.gguf.lower()}"
        return self.target.choose_format(self.scheme) if self.target is not None else "auto_round"
