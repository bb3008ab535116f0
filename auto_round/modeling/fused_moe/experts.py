"""Fused mixture-of-experts modules taken apart into one linear layer per expert and matrix.

A fused module holds one parameter for all experts, `[experts, a, b]`. Two kinds of modules can stand in for it:

- `UnfusedExperts` calls the layers. It serves modules that follow Transformers' experts interface, whose computation
  is known: up projection, gate, down projection, routing weights.
- `StackedExperts` runs the original `forward` unchanged, on parameters put together from the layers' weights. It
  serves every other module, whatever its `forward` does.

Both keep everything else of the fused module (same names, same objects) and say in `origin` where each of their
tensors is found in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.modeling.fused_moe.layout import Layout, Slice, build_experts, clone_shell, read_tensor

__all__ = ["ExpertWeights", "Layout", "Slice", "StackedExperts", "UnfusedExperts", "routed_sum"]


def routed_sum(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    experts: int,
    compute: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Send each token to its experts and add up what they return, times the routing weights.

    Args:
        hidden_states: `[tokens, hidden]`.
        top_k_index: `[tokens, k]`; an index of `experts` or above stands for no expert and is skipped.
        top_k_weights: `[tokens, k]`.
        experts: number of experts.
        compute: `(expert, [n, hidden]) -> [n, hidden]`; called only for experts that have tokens.

    Returns:
        `[tokens, hidden]` in the dtype of `hidden_states`; the sum is kept in at least 32 bits.
    """
    # Sorting once, with one transfer of the counts, instead of looking up each expert's tokens on the device.
    assignments = top_k_index.reshape(-1)
    order = assignments.argsort(stable=True)
    counts = torch.bincount(assignments, minlength=experts)[:experts].tolist()
    weights = top_k_weights.reshape(-1, 1)
    output = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows = order[start : start + count]
        start += count
        tokens = rows // top_k_index.shape[-1]
        value = compute(expert, hidden_states[tokens]) * weights[rows]
        output.index_add_(0, tokens, value.to(output.dtype))
    return output.to(hidden_states.dtype)


class UnfusedExperts(nn.Module):
    """Experts of Transformers' experts interface as linear layers, called one expert at a time.

    Children "0" … "E-1" hold each expert's layers; the gate, the activation and the norms are the fused module's own.
    A layer may be replaced by any module that is called the same way.

    Attributes:
        origin: own parameter name -> the slice of the fused module it was taken from.
        expert_count: number of experts.
    """

    # What the interface's decorator assumes where it is not told otherwise.
    has_gate = True
    has_post_expert_norm = False
    is_concatenated = True
    original_class: type[nn.Module] = nn.Module
    origin: dict[str, Slice]

    @classmethod
    def from_fused(cls, fused: nn.Module, layouts: Sequence[Layout]) -> UnfusedExperts:
        """Take a module apart.

        Args:
            fused: the module; its parameters may be on the meta device.
            layouts: the layout of the up (or gate and up) projection, then that of the down projection.
        """
        lost = [name for layout in layouts for name in (layout.parameter, layout.bias) if name]
        new = clone_shell(fused, _variant(cls, type(fused)), lost)
        experts, new.origin = build_experts(fused, layouts)
        new._modules.update(experts)
        new.expert_count = layouts[-1].count(read_tensor(fused, layouts[-1].parameter))
        new._up_names, new._down_name = layouts[0].names, layouts[-1].names[0]
        new._argument_names = tuple(inspect.signature(type(fused).forward).parameters)[1:4]
        return new

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # The fused class's own methods (`_apply_gate` and what it calls) work on this module: it has the
            # attributes that they read. It is no subclass, because Transformers initializes by class.
            attribute = getattr(self.original_class, name)
            return MethodType(attribute, self) if isinstance(attribute, FunctionType) else attribute

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Same as the fused module: `(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]`."""
        hidden_states, index, weights = (*args, *(kwargs[name] for name in self._argument_names[len(args) :]))
        return routed_sum(hidden_states, index, weights, self.expert_count, self.run_expert)

    def run_expert(self, index: int, hidden_states: Tensor) -> Tensor:
        """What one expert makes of its tokens, `[n, H] -> [n, H]`, before the routing weights."""
        expert = self._modules[str(index)]
        parts = [expert.get_submodule(name)(hidden_states) for name in self._up_names]
        if len(parts) == 1:
            projected = parts[0]
        elif self.is_concatenated:
            projected = torch.cat(parts, dim=-1)
        else:
            projected = torch.stack(parts, dim=-1).flatten(-2)
        activated = self._apply_gate(projected) if self.has_gate else self.act_fn(projected)
        output = expert.get_submodule(self._down_name)(activated)
        return self.post_expert_norm(output) if self.has_post_expert_norm else output


@cache
def _variant(cls: type[UnfusedExperts], original: type[nn.Module]) -> type[UnfusedExperts]:
    return type(f"Unfused{original.__name__}", (cls,), {"original_class": original, "__doc__": cls.__doc__})


class ExpertWeights:
    """Stands for a fused parameter whose matrices are the weights of layers.

    Reading one expert, as a loop over experts does, costs that expert only; any other use as a tensor puts the whole
    parameter together. Gradients reach the layers' weights.
    """

    _is_hf_initialized = True  # Transformers must not initialize what it takes for a parameter

    def __init__(self, module: StackedExperts, layout: Layout, shape: torch.Size):
        self.module, self.layout, self.shape = module, layout, shape

    def matrix(self, index: int) -> Tensor:
        """One expert's matrix, oriented as the fused parameter stores it."""
        expert = self.module._modules[str(index)]
        parts = [(expert.get_submodule(name) if name else expert).weight for name in self.layout.names]
        if len(parts) == 1:
            weight = parts[0]
        elif self.layout.interleaved:
            weight = torch.stack(parts, dim=1).flatten(0, 1)
        else:
            weight = torch.cat(parts)
        return weight.transpose(0, 1) if self.layout.transposed else weight

    def tensor(self) -> Tensor:
        """The whole parameter."""
        experts = self.shape[0] // (self.layout.rows or 1)
        matrices = [self.matrix(index) for index in range(experts)]
        return torch.stack(matrices) if self.layout.rows is None else torch.cat(matrices)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix(0).dtype

    @property
    def device(self) -> torch.device:
        return self.matrix(0).device

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Tensor:
        scalar = isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool
        if (scalar or isinstance(index, int)) and self.layout.rows is None:
            number = int(index)
            if not -len(self) <= number < len(self):
                raise IndexError(f"expert {number} of {len(self)}")
            return self.matrix(number % len(self))
        return self.tensor()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        return function(*_tensors(args), **{key: _tensors(value) for key, value in (kwargs or {}).items()})


def _tensors(value: Any) -> Any:
    """Arguments of a torch function with the stand-ins replaced by tensors."""
    if isinstance(value, ExpertWeights):
        return value.tensor()
    if isinstance(value, (list, tuple)):
        return type(value)(_tensors(item) for item in value)
    return value


def _operator(name: str) -> Callable:
    def apply(self: ExpertWeights, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*_tensors(args))

    return apply


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "rmatmul", "neg"):
    setattr(ExpertWeights, f"__{_name}__", _operator(f"__{_name}__"))


class StackedExperts:
    """Mixed into the fused module's own class: the expert parameters are read from per-expert linear layers.

    Children "0" … "E-1" are the layers, or hold them; the original `forward` runs unchanged. A layer may be replaced
    by any module that has a `weight`.

    Attributes:
        origin: own parameter name -> the slice of the fused module it was taken from.
        expert_count: number of experts.
    """

    origin: dict[str, Slice]

    @classmethod
    def from_fused(cls, fused: nn.Module, layouts: Sequence[Layout]) -> StackedExperts:
        """Take a module apart; its parameters may be on the meta device. Biases stay as they are."""
        layouts = tuple(layouts)
        names = tuple(layout.parameter for layout in layouts)
        new = clone_shell(fused, _stacked_class(cls, type(fused), names), names)
        shapes = (read_tensor(fused, name).shape for name in names)
        new._expert_weights = dict(zip(names, zip(layouts, shapes, strict=True), strict=True))
        experts, new.origin = build_experts(fused, layouts)
        new._modules.update(experts)
        new.expert_count = max(layout.count(read_tensor(fused, layout.parameter)) for layout in layouts)
        return new


@cache
def _stacked_class(cls: type, original: type[nn.Module], names: tuple[str, ...]) -> type:
    def reader(name: str) -> property:
        return property(lambda self: ExpertWeights(self, *self._expert_weights[name]))

    return type(f"Stacked{original.__name__}", (cls, original), {name: reader(name) for name in names})
