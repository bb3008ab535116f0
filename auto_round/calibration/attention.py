"""The largest queries, keys and values that attention works on while calibration samples pass, and scales for them.

Engines keep keys and values in float8 and multiply them with a fixed scale per layer. All models that call attention
through Transformers' interface are served alike: what they hand to it has its norms and rotary embedding behind it, and
is what they put into the cache.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from auto_round.data_type.fp8 import MIN_SCALE, stored
from auto_round.plan import PlanError
from auto_round.settings import AttentionSettings

LARGEST = 448.0  # of E4M3
_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
_CACHES = ("past_key_values", "past_key_value", "layer_past")

Tensors = dict[str, torch.Tensor]
Watch = Callable[[nn.Module, Tensors], Tensors]


def cached_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Modules, by name, that are called attention and take a cache of keys and values; of nested ones the innermost."""
    found = {
        name: module
        for name, module in model.named_modules()
        if _ATTENTION.search(type(module).__name__)
        and not inspect.signature(module.forward).parameters.keys().isdisjoint(_CACHES)
    }
    around = {name[:end] for name in found for end, letter in enumerate(name) if letter == "."}
    return {name: module for name, module in found.items() if name not in around}


def check_attentions(model: nn.Module, settings: AttentionSettings, calls: Collection[tuple[str, int]]) -> None:
    """Make sure, before any block is tuned, that scales can be found for every cache of keys and values.

    calls: block name and turn of every call of a block that is quantized.

    Raises:
        PlanError: an attention module that no sample reaches, one that is called several times, or one that caches
            something other than its keys and values.
    """
    if not settings.scaled:
        return
    option = _option(settings)
    attentions = cached_attentions(model)
    if not attentions:
        raise PlanError(f"{option}: {type(model).__name__} has no attention with a cache of keys and values")
    for name, module in attentions.items():
        problem = _problem(name, module, calls)
        if problem:
            raise PlanError(f"{option}: {name} ({type(module).__name__}) {problem}")


def _problem(name: str, module: nn.Module, calls: Collection[tuple[str, int]]) -> str | None:
    """Why no scales can be found for a module, and what to do; None if they can."""
    turns = [turn for block, turn in calls if f"{name}.".startswith(f"{block}.")]
    if hasattr(module, "kv_lora_rank"):
        return (
            "has keys and values that engines cache in a compressed form, which Transformers does not compute: leave "
            "the option out"
        )
    if not turns:
        return (
            "is in no block that is quantized and that samples come through, so that its scales cannot be found: "
            "leave to_quant_block_names out, or the option"
        )
    if any(turns):
        return "is called several times, each with a cache of its own, and files hold one scale: leave the option out"
    return None


@contextlib.contextmanager
def attention_scales(settings: AttentionSettings, model: nn.Module, block: str) -> Iterator[dict[str, torch.Tensor]]:
    """While open, watch attention in a block; afterwards the result holds its scales.

    Yields:
        `<attention module>.k_scale` and the like → float32 [1], or [heads] with a scale per head. The largest
        magnitude of that tensor, divided by 448, in bfloat16's precision.

    Raises:
        PlanError: a module that has keys and values does not hand them to Transformers' attention interface.
    """
    scales: dict[str, torch.Tensor] = {}
    wanted = cached_attentions(model.get_submodule(block)) if settings.scaled else {}
    if not wanted:
        yield scales
        return
    modules = set(wanted.values())
    largest: dict[tuple[nn.Module, str], torch.Tensor] = {}

    def watch(module: nn.Module, tensors: Tensors) -> Tensors:
        for part in settings.scaled if module in modules else "":
            heads = tensors[part].detach().abs().amax((0, 2, 3)).float()
            key = module, part
            largest[key] = torch.maximum(largest[key], heads) if key in largest else heads
        return tensors

    with watched_attention(watch):
        yield scales
    for name, module in wanted.items():
        full = f"{block}.{name}" if name else block
        for part in settings.scaled:
            if (module, part) not in largest:
                raise PlanError(
                    f"{_option(settings)}: {full} ({type(module).__name__}) does not call Transformers' attention "
                    "interface, so that its keys and values cannot be seen: leave the option out"
                )
            scales[f"{full}.{part}_scale"] = _scale(largest[module, part], settings.per_head)


@contextlib.contextmanager
def rounded_cache(model: nn.Module, scales: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While open, keys and values are what a float8 cache with these scales (see `attention_scales`) makes of them."""
    stems = {name.rpartition(".")[0] for name in scales}
    owners = {model.get_submodule(stem): stem for stem in stems}

    def watch(module: nn.Module, tensors: Tensors) -> Tensors:
        if module not in owners:
            return tensors
        stem = owners[module]
        return {part: x if part == "q" else _rounded(x, scales[f"{stem}.{part}_scale"]) for part, x in tensors.items()}

    with watched_attention(watch):
        yield


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x` [batch, heads, length, size] in float8 and back, in its own dtype as engines compute."""
    scale = scale.to(x.device, x.dtype).view(-1, 1, 1)
    codes = (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes.to(x.dtype) * scale


def _option(settings: AttentionSettings) -> str:
    return "static_attention_dtype" if settings.static_attention_dtype else "static_kv_dtype"


def _scale(heads: torch.Tensor, per_head: bool) -> torch.Tensor:
    """float32 [heads] or [1] from the largest magnitude of each head."""
    largest = heads if per_head else heads.amax().reshape(1)
    return stored((largest / LARGEST).clamp(min=MIN_SCALE)).cpu()


class _Watched:
    """An attention function that shows what it is given, and goes on with what it gets for it."""

    def __init__(self, function: Callable, watch: Watch):
        self.function, self.watch = function, watch

    def __call__(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        seen = self.watch(module, {"q": query, "k": key, "v": value})
        return self.function(module, seen["q"], seen["k"], seen["v"], *args, **kwargs)


@contextlib.contextmanager
def watched_attention(watch: Watch) -> Iterator[None]:
    """While open, show `watch` every call of attention, which goes on with what `watch` returns.

    It gets the module, and queries, keys and values as "q", "k" and "v": [batch, heads, length, size].
    The lookup of attention functions is watched, not their names: models ask for the name to choose masks and kernels,
    and with "eager" each brings a function of its own.
    """
    from transformers.modeling_utils import AttentionInterface

    def watched(found: Callable) -> Callable:
        return found if isinstance(found, _Watched) else _Watched(found, watch)

    own = {name: vars(AttentionInterface).get(name) for name in ("get_interface", "__getitem__")}
    get_interface, get_item = AttentionInterface.get_interface, AttentionInterface.__getitem__
    AttentionInterface.get_interface = lambda self, *args, **kwargs: watched(get_interface(self, *args, **kwargs))
    AttentionInterface.__getitem__ = lambda self, key: watched(get_item(self, key))
    try:
        yield
    finally:
        for name, function in own.items():
            if function is None:
                delattr(AttentionInterface, name)
            else:
                setattr(AttentionInterface, name, function)
