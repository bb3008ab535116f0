"""Llama 4: experts that every token is sent to, all but the chosen ones with an input of zero.

`Llama4TextExperts` stores `gate_up_proj [E, H, 2I]` and `down_proj [E, I, H]`, input dimension first. The block
multiplies the *input* of each expert by the sigmoid of the router's score, which is zero for experts that were not
chosen; experts have no bias, so only the chosen ones add anything.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from auto_round.modeling.fused_moe.layout import build_experts, clone_shell
from auto_round.modeling.fused_moe.replace_modules import register_replacement
from auto_round.modeling.fused_moe.structure import expert_layouts


class Llama4Experts(nn.Module):
    """Experts of a Llama 4 block as linear layers; children "0" … "E-1" hold gate_proj, up_proj and down_proj."""

    def forward(self, hidden_states: Tensor, router_scores: Tensor) -> Tensor:
        """Sum over the experts that have a score: `[T, H], [T, E] -> [T, H]`, in the dtype of the hidden states."""
        output = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        tokens, experts = router_scores.nonzero(as_tuple=True)
        for index in experts.unique().tolist():
            chosen = tokens[experts == index]
            value = self.run_expert(index, hidden_states[chosen] * router_scores[chosen, index, None])
            output.index_add_(0, chosen, value.to(output.dtype))
        return output.to(hidden_states.dtype)

    def run_expert(self, index: int, hidden_states: Tensor) -> Tensor:
        """What one expert makes of its (scaled) tokens, `[n, H] -> [n, H]`."""
        expert = self._modules[str(index)]
        return expert.down_proj(expert.up_proj(hidden_states) * self.act_fn(expert.gate_proj(hidden_states)))


class Llama4Moe(nn.Module):
    """A Llama 4 block that computes the chosen experts only.

    Attributes:
        origin: own parameter name -> the slice of the fused block it was taken from.
    """

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., H]` to the block's output `[T, H]` and the router's logits `[T, E]`, as the fused block returns."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        router_scores, router_logits = self.router(hidden_states)
        routed = self.experts(hidden_states, router_scores)
        return self.shared_expert(hidden_states) + routed, router_logits


@register_replacement("Llama4TextMoe")
def replace(module: nn.Module, name: str, model: nn.Module) -> nn.Module:
    """The block with one set of linear layers per expert."""
    fused = module.experts
    layouts = expert_layouts(fused, f"{name}.experts", model)
    experts = clone_shell(fused, Llama4Experts, [layout.parameter for layout in layouts])
    layers, origin = build_experts(fused, layouts)
    experts._modules.update(layers)
    new = clone_shell(module, Llama4Moe)
    new._modules["experts"] = experts
    new.origin = {f"experts.{key}": part.inside("experts") for key, part in origin.items()}
    return new
