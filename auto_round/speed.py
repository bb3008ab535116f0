"""How fast this machine is at what a run does: a few matrix products, attention, and quantizing slices of the layers.

Nothing is cached: a machine that is busy now is slow now. Samples are small, so that measuring takes a second or so
and less memory than the run; what a sample takes is scaled by tokens or weights.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from auto_round.algorithms.tuning import Rule
from auto_round.compressors.chain import inputs_of
from auto_round.data_type import data_type
from auto_round.data_type.base import QuantizedTensor, Tunable, WeightTask
from auto_round.formats.packing import pack_bits, unpack_bits
from auto_round.schemes import TensorSpec

SAMPLE_WEIGHTS = 1 << 19  # elements of a weight whose scales are searched: more are searched piece by piece
STEP_WEIGHTS = 1 << 21  # elements of a weight that takes a step: beyond a CPU's cache, as a layer is
WIDEST, HEADS, ROWS = 4096, 4, 512  # channels, heads and tokens that are tried
WATCHED = 1 << 23  # elements of a watched input: in float32 more than the allocator keeps, so its pages come anew
PRODUCT = 2.5e9  # multiplications and additions of a sampled matrix product
TOKENS = 1024  # of it at most: with more, so few columns are left that its backward is another product
DRAWN = 1 << 20  # random numbers, repeated in larger tensors: to draw them takes longer than to use them
ENOUGH = 0.06  # seconds after which a measurement is not repeated
REPEATS = 3


@dataclass(frozen=True)
class LayerShape:
    """What layers of equal cost share. spec: None for a layer that stays as it is. rows: tokens that come at once."""

    out_features: int
    in_features: int
    spec: TensorSpec | None
    rows: int

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class LayerSpeed:
    """Seconds for each token (forward, backward, and what is learned of a layer's inputs: watch) and for each weight.

    read: its code unpacked and made a float again. judge: rounded as tuned so far. tune: one step of tuning.
    """

    forward: float
    backward: float
    watch: float
    quantize: float
    read: float
    judge: float
    tune: float


class _WeightSpeed(NamedTuple):
    """The part of a layer's speed that does not depend on its tokens."""

    quantize: float
    read: float
    judge: float = 0.0
    tune: float = 0.0


@dataclass(frozen=True)
class Speed:
    """A machine's speed. glue, glue_back: seconds for each token of what lies between a block's layers."""

    layers: Mapping[LayerShape, LayerSpeed]
    glue: float
    glue_back: float
    write: float  # seconds for each byte that is copied and hashed


@dataclass(frozen=True)
class Glue:
    """What a block does beside its layers: attention of `heads` over `length` tokens, norms, products of channels."""

    hidden: int
    channels: int  # outputs of all layers that a token passes
    heads: int
    head_dim: int
    length: int


@dataclass(frozen=True)
class Setting:
    """Where and how blocks compute.

    search: whether scales are searched. rule: what makes a rule by which rounding is tuned; None where it is not.
    """

    device: torch.device
    dtype: torch.dtype
    amp: Callable[[], AbstractContextManager]
    search: bool
    rule: Callable[[], Rule] | None

    def random(self, *shape: int) -> torch.Tensor:
        count = math.prod(shape)
        drawn = torch.randn(min(count, DRAWN), generator=torch.Generator().manual_seed(0)).mul_(0.02)
        return drawn.to(self.dtype).repeat(-(-count // DRAWN))[:count].view(shape).to(self.device)


def measure(shapes: Iterable[LayerShape], glue: Glue, setting: Setting) -> Speed:
    """Try every shape. The random numbers of the run stay as they are."""
    weights: dict[tuple, _WeightSpeed] = {}  # of each weight that is tried, by what it is
    layers = {shape: _layer(shape, setting, weights) for shape in shapes}
    forward, backward = _glue(glue, setting)
    return Speed(layers, forward, backward, _write())


def _layer(shape: LayerShape, setting: Setting, known: dict[tuple, _WeightSpeed]) -> LayerSpeed:
    forward, backward = _product(shape, setting)
    if shape.spec is None:
        return LayerSpeed(forward, backward, 0.0, 0.0, 0.0, 0.0, 0.0)
    key = shape.in_features, shape.spec, _rows(shape, SAMPLE_WEIGHTS), _rows(shape, STEP_WEIGHTS)
    if key not in known:
        known[key] = _weight(shape, setting)
    return LayerSpeed(forward, backward, _watching(shape, setting), *known[key])


def _weight(shape: LayerShape, setting: Setting) -> _WeightSpeed:
    family = data_type(shape.spec.data_type)
    task = _sample(shape, SAMPLE_WEIGHTS, setting)
    quantize = best(lambda: family.quantize(task), setting.device) / task.weight.numel()
    wide = dataclasses.replace(_sample(shape, STEP_WEIGHTS, setting), search=False)
    read = _reading(family.quantize(wide)) / wide.weight.numel()
    if setting.rule is None:
        return _WeightSpeed(quantize, read)
    judge, tune = _tuning(family.tunable(wide), setting)
    return _WeightSpeed(quantize, read, judge / wide.weight.numel(), tune / wide.weight.numel())


def _reading(tensor: QuantizedTensor) -> float:
    """As the work folder and the result are read."""
    codes = tensor.codes.cpu()
    codes = (codes if codes.dtype == torch.uint8 else codes.view(torch.uint8)).contiguous()
    packed = pack_bits(codes, tensor.spec.bits, dim=1)
    unpacking = best(lambda: unpack_bits(packed, tensor.spec.bits, dim=1), torch.device("cpu"))
    return unpacking + best(tensor.dequantize, tensor.codes.device)


def _sample(shape: LayerShape, most: int, setting: Setting) -> WeightTask:
    """The first rows of a layer of that shape; whole blocks of them, as formats with blocks of rows need."""
    weight = setting.random(_rows(shape, most), shape.in_features)
    return WeightTask(weight, shape.spec, weight.float().square().mean(0), setting.search)


def _rows(shape: LayerShape, most: int) -> int:
    return min(shape.out_features, max(128, most // shape.in_features // 128 * 128))


def _product(shape: LayerShape, setting: Setting) -> tuple[float, float]:
    """Seconds for each token of a layer's forward, and of its backward to weights and inputs."""
    rows = min(shape.rows, TOKENS)
    columns = max(32, min(shape.out_features, int(PRODUCT / (2 * rows * shape.in_features))))
    columns = min(columns, shape.out_features)
    x = setting.random(rows, shape.in_features)
    weight = setting.random(columns, shape.in_features)
    scale = shape.out_features / columns / rows

    ahead, back = _there_and_back(lambda: functional.linear(x, weight), [x, weight], setting)
    return ahead * scale, back * scale


def _watching(shape: LayerShape, setting: Setting) -> float:
    """Seconds for each token of what is collected of a layer's inputs while the original runs."""
    rows = min(shape.rows, max(1, WATCHED // shape.in_features))
    x, layer = setting.random(rows, shape.in_features), torch.nn.Identity()
    with inputs_of({"layer": layer}):
        return best(lambda: layer(x.view_as(x)), setting.device) / rows  # a new tensor: what it is is found anew


def _tuning(tunable: Tunable, setting: Setting) -> tuple[float, float]:
    """Seconds of rounding a weight, and of a step as tuning takes it: rounding, its gradient, and the rule's move."""
    rule = setting.rule()

    @torch.no_grad()
    def rounded() -> torch.Tensor:
        return tunable.fake_quantize(setting.dtype)

    gradient = torch.ones_like(rounded())

    def move() -> None:
        tunable.fake_quantize(gradient.dtype).backward(gradient)
        with torch.no_grad():
            for kind, parameter in tunable.parameters.items():
                rule.move(parameter, kind, 1.0)
                parameter.grad = None

    judge = best(rounded, setting.device)
    return judge, judge + best(move, setting.device)


def _glue(glue: Glue, setting: Setting) -> tuple[float, float]:
    """Seconds for each token, there and back: two norms with their sums, a product over the channels, attention.

    Parts of them are tried: time grows with the channels and heads in proportion.
    """
    hidden, channels, heads = min(glue.hidden, WIDEST), min(glue.channels, WIDEST), min(glue.heads, HEADS)
    rows = min(glue.length, ROWS)
    states = setting.random(rows, hidden)
    wide = setting.random(rows, max(2, channels // 2 * 2))
    parts = [
        (lambda: _norms(states), [states], glue.hidden / hidden / rows),
        (lambda: functional.silu(wide[:, ::2]) * wide[:, 1::2], [wide], glue.channels / channels / rows),
    ]
    if glue.heads:
        query, value = (setting.random(1, heads, glue.length, max(glue.head_dim, 8)) for _ in range(2))
        attention = functional.scaled_dot_product_attention
        scale = glue.heads / heads / glue.length
        parts.append((lambda: attention(query * value, query + value, value, is_causal=True), [query, value], scale))
    timed = [_there_and_back(action, inputs, setting) for action, inputs, _ in parts]
    scales = [scale for _, _, scale in parts]
    return tuple(sum(pair[i] * scale for pair, scale in zip(timed, scales, strict=True)) for i in (0, 1))


def _norms(states: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        wide = states.float()
        states = states + (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(states.dtype)
    return states


def _there_and_back(
    action: Callable[[], torch.Tensor], inputs: list[torch.Tensor], setting: Setting
) -> tuple[float, float]:
    """Seconds of a forward, and of its backward (0 where nothing is tuned)."""

    def forward() -> torch.Tensor:
        with setting.amp():
            return action()

    with torch.no_grad():
        ahead = best(forward, setting.device)
    if setting.rule is None:
        return ahead, 0.0
    for tensor in inputs:
        tensor.requires_grad_()

    def both() -> None:
        output = forward()
        torch.autograd.backward(output, torch.ones_like(output))
        for tensor in inputs:
            tensor.grad = None

    return ahead, max(best(both, setting.device) - ahead, ahead)


def _write() -> float:
    """Seconds for each byte: two hashes (of the codes, of the files) and a copy."""
    import hashlib

    data = bytes(1 << 22)
    return best(lambda: (hashlib.sha256(data), hashlib.sha256(data), bytearray(data)), torch.device("cpu")) / len(data)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that a large matrix product reaches: the floor of a block's tuning."""
    size = 8192 if device.type == "cuda" else 2048
    one, other = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / best(lambda: one @ other, device)


def best(action: Callable[[], object], device: torch.device) -> float:
    """Shortest of a few runs, in seconds; the first one warms up and is not counted unless it takes long."""
    shortest, spent = math.inf, 0.0
    for turn in range(REPEATS + 1):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - began
        spent += took
        if turn or took > ENOUGH:
            shortest = min(shortest, took)
        if spent > ENOUGH and shortest < math.inf:
            break
    return shortest
