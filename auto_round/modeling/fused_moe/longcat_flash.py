"""LongCat-Flash: routed experts followed by experts that return their input.

`gate_up_proj [E + Z, 2I, H]` has rows for the Z experts without weights as well, which nothing reads;
`down_proj [E, H, I]` has not.
"""

from __future__ import annotations

from torch import Tensor, nn

from auto_round.modeling.fused_moe.experts import UnfusedExperts, routed_sum
from auto_round.modeling.fused_moe.replace_modules import register_replacement
from auto_round.modeling.fused_moe.structure import matrices, unfuse_interface


class LongcatExperts(UnfusedExperts):
    """Unfused experts, of which the last ones pass their input on."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`[T, H], [T, K], [T, K] -> [T, H]`."""
        return routed_sum(hidden_states, top_k_index, top_k_weights, self.total_experts, self.run_expert)

    def run_expert(self, index: int, hidden_states: Tensor) -> Tensor:
        if index >= self.expert_count:
            return self.identity_expert(hidden_states)
        return super().run_expert(index, hidden_states)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


@register_replacement("LongcatFlashExperts")
def replace(module: nn.Module, name: str, model: nn.Module) -> nn.Module:
    """One set of linear layers per expert; a module without routed experts stays."""
    return unfuse_interface(module, name, model, LongcatExperts) if matrices(module) else module
