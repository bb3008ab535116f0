"""DBRX: experts stacked in two dimensions.

`DbrxExperts.mlp` holds `w1` (gate), `v1` (up) and `w2` (down), each `[E * F, H]`: expert e has the rows from `e * F`.
`w1` and `v1` are `[out, in]`; `w2` is multiplied from the left, so it is `[in, out]`.
"""

from __future__ import annotations

from torch import Tensor, nn

from auto_round.modeling.fused_moe.experts import routed_sum
from auto_round.modeling.fused_moe.layout import Layout, build_experts, clone_shell
from auto_round.modeling.fused_moe.replace_modules import register_replacement


class DbrxUnfusedExperts(nn.Module):
    """Experts of a DBRX block as linear layers: `mlp.N.w1`, `mlp.N.v1` and `mlp.N.w2`.

    Attributes:
        origin: own parameter name -> the slice of the fused module it was taken from.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`[B, S, H], [B * S, K], [B * S, K] -> [B, S, H]`."""
        flat = hidden_states.reshape(-1, self.hidden_size)
        output = routed_sum(flat, top_k_index, top_k_weights, self.num_experts, self.run_expert)
        return output.view(hidden_states.shape[0], -1, self.hidden_size)

    def run_expert(self, index: int, hidden_states: Tensor) -> Tensor:
        """What one expert makes of its tokens, `[n, H] -> [n, H]`."""
        expert = self.mlp._modules[str(index)]
        return expert.w2(self.mlp.activation_fn(expert.w1(hidden_states)) * expert.v1(hidden_states))


@register_replacement("DbrxExperts")
def replace(module: nn.Module, name: str, model: nn.Module) -> nn.Module:
    """The experts with three linear layers each."""
    rows = module.ffn_hidden_size
    layouts = [Layout(weight, (weight,), transposed=weight == "w2", rows=rows) for weight in ("w1", "v1", "w2")]
    mlp = clone_shell(module.mlp, nn.Module, [layout.parameter for layout in layouts])
    layers, origin = build_experts(module.mlp, layouts)
    mlp._modules.update(layers)
    new = clone_shell(module, DbrxUnfusedExperts)
    new._modules["mlp"] = mlp
    new.origin = {f"mlp.{key}": part.inside("mlp") for key, part in origin.items()}
    return new
