"""The settings of a run, their defaults and the named recipes. The only place where a default stands."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


class SettingsError(ValueError):
    """A setting that is out of range, or settings that contradict each other."""


@dataclass(frozen=True)
class TuneSettings:
    """How rounding is tuned (SignRound, arXiv 2309.05516).

    iters: steps per block; 0 rounds to nearest.
    batch_size, gradient_accumulate_steps: their product is the number of samples that a step's direction rests on;
        `samples_per_step` of them are new, momentum carries the others over.
    lr: step of the rounding offsets, None for 1/iters; it falls linearly to 0.
    minmax_lr: step of the clipping factors, None for lr.
    not_use_best_mse: keep the last state instead of the best of those compared.
    dynamic_max_gap: stop a block after that many steps without a lower loss; -1 never.
    search: start from (or, at iters=0, use) scales that minimise the importance-weighted error instead of min/max.
    """

    iters: int = 200
    lr: float | None = None
    minmax_lr: float | None = None
    momentum: float = 0.5
    batch_size: int = 8
    gradient_accumulate_steps: int = 1
    enable_minmax_tuning: bool = True
    enable_quanted_input: bool = True
    not_use_best_mse: bool = False
    dynamic_max_gap: int = -1
    search: bool = True
    amp: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        for name, low in (("iters", 0), ("batch_size", 1), ("gradient_accumulate_steps", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise SettingsError(f"{name}={value!r} must be a whole number of at least {low}")
        if not 0 <= self.momentum < 1:
            raise SettingsError(f"momentum={self.momentum!r} must be at least 0 and below 1")
        for name in ("lr", "minmax_lr"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 10:
                raise SettingsError(f"{name}={value!r} must be a small positive number, such as 0.005")

    @property
    def samples_per_step(self) -> int:
        """Samples drawn for one step: half a batch, as with momentum the other half is the step's before.

        Measured on a trained model: KL divergence at 4 bits is that of whole batches, at 2 bits lower, at 0.55 of
        the time (see benchmarks/README.md).
        """
        return max(1, self.batch_size * self.gradient_accumulate_steps // 2)

    @property
    def rounding_lr(self) -> float:
        return self.lr if self.lr is not None else 1.0 / max(self.iters, 1)

    @property
    def clip_lr(self) -> float:
        return self.minmax_lr if self.minmax_lr is not None else self.rounding_lr

    @property
    def needs_data(self) -> bool:
        return self.iters > 0 or self.search


@dataclass(frozen=True)
class CalibSettings:
    """What text the model sees: `nsamples` samples of `seqlen` tokens of `dataset` (None: the text shipped with us)."""

    dataset: Any = None
    nsamples: int = 128
    seqlen: int = 2048
    apply_chat_template: bool = False
    extra_data_dir: str | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        for name in ("nsamples", "seqlen"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise SettingsError(f"{name}={value!r} must be a whole number of at least 1")


# Named recipes: they fill only what the user left unset.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {"iters": 200},
    "best": {"iters": 1000, "nsamples": 512},
    "light": {"iters": 50, "lr": 5e-3},
    "opt_rtn": {"iters": 0, "disable_opt_rtn": False},
    "rtn": {"iters": 0, "disable_opt_rtn": True},
}


def describe(tune: TuneSettings) -> dict[str, Any]:
    """Settings worth recording in a checkpoint: those that differ from the defaults."""
    defaults = TuneSettings()
    changed = {f.name: getattr(tune, f.name) for f in dataclasses.fields(tune)}
    return {name: value for name, value in changed.items() if value != getattr(defaults, name)}
