"""Where the matrices of single experts lie in the parameters of a fused module, and layers made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Slice(NamedTuple):
    """Where one expert's weight `[out, in]` or bias `[out]` lies in a parameter of the fused module.

    A model has tens of thousands of them, so they are the cheapest of objects.

    Attributes:
        parameter: name of the parameter, relative to the fused module.
        expert: index along the first dimension; None where the parameter belongs to one expert.
        start, stop, step: the output rows, once the matrix is oriented `[out, in]`.
        transposed: whether the parameter stores its matrices `[in, out]`.
        rows: rows of one expert where experts are stacked in two dimensions, `[experts * rows, n]`.
    """

    parameter: str
    expert: int | None = None
    start: int | None = None
    stop: int | None = None
    step: int | None = None
    transposed: bool = False
    rows: int | None = None

    def view(self, fused: Tensor) -> Tensor:
        """The part of the fused tensor that this slice names, `[out, in]` or `[out]`, sharing its memory."""
        matrix = fused
        if self.expert is not None and self.rows is None:
            matrix = fused[self.expert]
        elif self.expert is not None:
            matrix = fused[self.expert * self.rows : (self.expert + 1) * self.rows]
        if self.transposed:
            matrix = matrix.transpose(-2, -1)
        return matrix[self.start : self.stop : self.step]

    def take(self, fused: Tensor) -> Tensor:
        """A contiguous copy of the weight `[out, in]` or the bias `[out]`; allocates nothing on the meta device."""
        return self.view(fused.detach()).clone(memory_format=torch.contiguous_format)

    def inside(self, child: str) -> Slice:
        """The same slice, seen from the module that holds the fused one as `child`."""
        return self._replace(parameter=f"{child}.{self.parameter}")

    def put(self, fused: Tensor, value: Tensor) -> None:
        """Write a weight `[out, in]` or bias `[out]` to its place in the fused tensor."""
        with torch.no_grad():
            self.view(fused).copy_(value)


@dataclass(frozen=True)
class Layout:
    """How a fused parameter holds its experts' matrices, and what the layers made of it are called.

    Attributes:
        parameter: the fused parameter, relative to the fused module; `[experts, out, in]` unless said otherwise.
        names: the layers that its output rows are divided into; `("",)` makes the expert the layer itself.
        bias: the fused bias `[experts, out]`, if any.
        transposed: the parameter is `[experts, in, out]`.
        interleaved: row i belongs to layer `i % len(names)` instead of the rows being divided into runs.
        rows: the parameter is two-dimensional, `[experts * rows, n]`.
    """

    parameter: str
    names: tuple[str, ...]
    bias: str | None = None
    transposed: bool = False
    interleaved: bool = False
    rows: int | None = None

    def count(self, fused: Tensor) -> int:
        """Number of experts in the parameter."""
        return fused.shape[0] // (self.rows or 1)

    def slices(self, fused: Tensor, expert: int, bias: bool = False) -> Iterator[tuple[str, Slice]]:
        """The (layer name, slice) pairs of one expert; `fused` is the parameter, or its bias with `bias`."""
        transposed = self.transposed and not bias
        rows = None if bias else self.rows
        # The output dimension of the stored tensor: [.., out, in], [.., in, out], or [.., out] for a bias.
        out = fused.shape[-1] if bias or transposed else (rows or fused.shape[-2])
        parts = len(self.names)
        for part, name in enumerate(self.names):
            if self.interleaved and parts > 1:
                where = (part, None, parts)
            elif parts > 1:
                where = (part * out // parts, (part + 1) * out // parts, None)
            else:
                where = (None, None, None)
            yield name, Slice(self.bias if bias else self.parameter, expert, *where, transposed, rows)


class Expert(nn.Module):
    """One expert's layers. It has no forward of its own: the module that owns it knows how to combine them."""


def make_linear(weight: Tensor, bias: Tensor | None = None, requires_grad: bool = True) -> nn.Linear:
    """A linear layer around a weight `[out, in]` and bias `[out]`, without initializing (or allocating) anything."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad))
    return layer


class _Maker:
    """Makes the modules of all experts: the first of a kind is built, the others are copies of it with other weights.

    To build a module takes several times as long as to copy one, and a model may need fifty thousand.
    """

    def __init__(self, requires_grad: bool):
        self._requires_grad = requires_grad
        self._linears: dict[str, nn.Linear] = {}

    def linear(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Linear:
        """A layer of that name in every expert; see `make_linear`."""
        if name not in self._linears:
            self._linears[name] = make_linear(weight, bias, self._requires_grad)
            return self._linears[name]
        layer = clone_shell(self._linears[name])
        layer._parameters["weight"] = nn.Parameter(weight, self._requires_grad)
        layer._parameters["bias"] = None if bias is None else nn.Parameter(bias, self._requires_grad)
        return layer


def read_tensor(module: nn.Module, name: str) -> Tensor:
    """A tensor of a module by dotted name, also where it is a property (the weight of a packed layer)."""
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _attach(parent: nn.Module, name: str, layer: nn.Module) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in parent._modules:
            parent._modules[part] = Expert()
        parent = parent._modules[part]
    parent._modules[leaf] = layer  # not `add_module`, whose checks of a name take longer than all else


def build_experts(fused: nn.Module, layouts: Sequence[Layout]) -> tuple[dict[str, nn.Module], dict[str, Slice]]:
    """Make the per-expert layers of a fused module, copying its weights expert by expert.

    Returns:
        The experts by their index as a string, and the slice that each of their parameters was taken from.
    """
    experts: dict[str, nn.Module] = {}
    origin: dict[str, Slice] = {}
    for layout in layouts:
        source = read_tensor(fused, layout.parameter)
        source_bias = None if layout.bias is None else read_tensor(fused, layout.bias)
        weights, biases, maker = _Taken(source), _Taken(source_bias), _Maker(source.requires_grad)
        for index in range(layout.count(source)):
            bias_slices = {} if source_bias is None else dict(layout.slices(source_bias, index, bias=True))
            for name, weight in layout.slices(source, index):
                key = f"{index}.{name}" if name else str(index)
                origin[f"{key}.weight"] = weight
                bias = None
                if name in bias_slices:
                    origin[f"{key}.bias"] = bias_slices[name]
                    bias = biases.take(name, bias_slices[name])
                layer = maker.linear(name, weights.take(name, weight), bias)
                if name:
                    _attach(experts.setdefault(str(index), Expert()), name, layer)
                else:
                    experts[str(index)] = layer
    return experts, origin


class _Taken:
    """Slices of a fused tensor. On the meta device those of one layer are alike in all experts: one serves them all."""

    def __init__(self, fused: Tensor | None):
        self._fused = fused
        self._empty: dict[str, Tensor] = {}

    def take(self, layer: str, part: Slice) -> Tensor:
        if self._fused.device.type != "meta":
            return part.take(self._fused)
        if layer not in self._empty:
            self._empty[layer] = part.take(self._fused)
        return self._empty[layer]


def clone_shell(module: nn.Module, cls: type[nn.Module] | None = None, without: Sequence[str] = ()) -> nn.Module:
    """A second module with the same attributes, parameters, buffers and children (the same objects).

    Its tables are its own: what is added to the clone, or taken from it, leaves the module as it is.

    Args:
        module: the module to clone.
        cls: class of the clone, if not the module's own.
        without: own parameters that the clone does not get.
    """
    clone = object.__new__(cls or type(module))
    state = {key: value.copy() if isinstance(value, (dict, set)) else value for key, value in module.__dict__.items()}
    if cls is not None:
        state.pop("forward", None)  # set on the instance by whoever wrapped the forward of the other class
    for name in without:
        state["_parameters"].pop(name, None)
    clone.__dict__.update(state)
    return clone
