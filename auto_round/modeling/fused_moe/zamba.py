"""Zamba: the projections of each state-space head are stacked in bare parameters [heads, out, in]."""

from __future__ import annotations

from torch import nn

from auto_round.modeling.fused_moe.experts import StackedExperts
from auto_round.modeling.fused_moe.layout import Layout
from auto_round.modeling.fused_moe.replace_modules import register_replacement


@register_replacement("ZambaMambaMixer")
def replace(module: nn.Module, name: str, model: nn.Module) -> nn.Module:
    """One layer per head for `x_proj_weight` [heads, states, inner] and `dt_proj_weight` [heads, inner, rank]."""
    parameters = ("x_proj_weight", "dt_proj_weight")
    layouts = [Layout(parameter, (parameter,)) for parameter in parameters if parameter in module._parameters]
    return StackedExperts.from_fused(module, layouts)
