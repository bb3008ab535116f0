"""Step 3.5 and 3.7: experts outside Transformers' experts interface.

Step 3.5's own code has one `MoELinear` for each of gate, up and down, with `weight [E, out, in]` and a forward that
multiplies in 32 bits by the weight of one expert; it keeps that forward. Transformers' `Step3p7Experts` computes what
the interface says (`gate_up_proj [E, 2I, H]`, gate rows first, `down_proj [E, H, I]`; the activations are clamped in
its `_apply_gate`) without being declared to.
"""

from torch import nn

from auto_round.modeling.fused_moe.experts import StackedExperts
from auto_round.modeling.fused_moe.replace_modules import register_replacement
from auto_round.modeling.fused_moe.structure import expert_layouts, unfuse_interface

register_replacement("Step3p7Experts")(unfuse_interface)


@register_replacement("MoELinear")
def replace(module: nn.Module, name: str, model: nn.Module) -> nn.Module:
    """One linear layer per expert, children "0" … "E-1"; the module's forward reads their weights."""
    return StackedExperts.from_fused(module, expert_layouts(module, name, model))
