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
    scale_iters: steps in which, after the last block, the scales of the whole model are trained together; 0 for none.
    scale_lr: step of these scales' factors; it falls linearly to 0.
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
    scale_iters: int = 0
    scale_lr: float = 0.003
    search: bool = True
    amp: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        for name, low in (("iters", 0), ("scale_iters", 0), ("batch_size", 1), ("gradient_accumulate_steps", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise SettingsError(f"{name}={value!r} must be a whole number of at least {low}")
        if not 0 <= self.momentum < 1:
            raise SettingsError(f"momentum={self.momentum!r} must be at least 0 and below 1")
        for name in ("lr", "minmax_lr", "scale_lr"):
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
        return self.iters > 0 or self.search or self.scale_iters > 0


@dataclass(frozen=True)
class CalibSettings:
    """What text the model sees: `nsamples` samples of `seqlen` tokens of `dataset` (None: the text shipped with us).

    expert_topup: further samples to choose from, for each that is used, so that rarely used experts get more tokens.
    """

    dataset: Any = None
    nsamples: int = 128
    seqlen: int = 2048
    apply_chat_template: bool = False
    extra_data_dir: str | None = None
    template: str | None = None
    expert_topup: int = 0

    def __post_init__(self) -> None:
        for name in ("nsamples", "seqlen"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise SettingsError(f"{name}={value!r} must be a whole number of at least 1")
        if not isinstance(self.expert_topup, int) or self.expert_topup < 0:
            raise SettingsError(f"expert_topup={self.expert_topup!r} must be a whole number, 0 for none")


_FP8 = ("fp8", "float8_e4m3fn", "torch.float8_e4m3fn")


@dataclass(frozen=True)
class AttentionSettings:
    """Fixed float8 scales (E4M3) for what attention works on, found by calibration and stored beside the weights.

    static_kv_dtype: "fp8" for scales of keys and values as they are cached; None for none.
    static_attention_dtype: "fp8" for scales of queries, keys and values; None for none.
    static_kv_granularity, static_attention_granularity: one scale per "tensor", or one per "head".
    """

    static_kv_dtype: Any = None
    static_kv_granularity: str = "tensor"
    static_attention_dtype: Any = None
    static_attention_granularity: str = "tensor"

    def __post_init__(self) -> None:
        for what in ("static_kv", "static_attention"):
            dtype, granularity = getattr(self, f"{what}_dtype"), getattr(self, f"{what}_granularity")
            if dtype is not None:
                object.__setattr__(self, f"{what}_dtype", _attention_dtype(f"{what}_dtype", dtype))
            if granularity not in ("tensor", "head"):
                raise SettingsError(f"{what}_granularity={granularity!r} is not known: use 'tensor' or 'head'")
            if dtype is None and granularity != "tensor":
                raise SettingsError(f"{what}_granularity={granularity!r} needs {what}_dtype='fp8' beside it")
        both = self.static_kv_dtype and self.static_attention_dtype
        if both and self.static_kv_granularity != self.static_attention_granularity:
            raise SettingsError(
                "static_kv_granularity and static_attention_granularity differ, and engines have one for both: "
                "give the same"
            )

    @property
    def scaled(self) -> str:
        """Which of q(ueries), k(eys) and v(alues) get scales: "", "kv" or "qkv"."""
        return "qkv" if self.static_attention_dtype else "kv" if self.static_kv_dtype else ""

    @property
    def per_head(self) -> bool:
        return "head" in (self.static_kv_granularity, self.static_attention_granularity)

    def asked(self) -> dict[str, str]:
        """The settings that are not what they are without being asked for."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in given.items() if value not in (None, "tensor")}


def _attention_dtype(name: str, value: Any) -> str:
    text = str(value).lower()
    if text in _FP8:
        return "fp8"
    if "fp4" in text:
        raise SettingsError(
            f"{name}={value!r} is not supported: no engine here reads scales for a cache in FP4, whose scales of 16 "
            "values are found anew while it runs: use 'fp8', or choose the cache's type in the engine"
        )
    raise SettingsError(f"{name}={value!r} is not known: use 'fp8' (float8_e4m3fn)")


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
