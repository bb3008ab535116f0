"""Qwen 3.5 MoE (also as a text model alone): a block of routed experts and one gated shared expert.

`experts.gate_up_proj [E, 2I, H]`, gate rows first, and `experts.down_proj [E, H, I]`. The block is replaced as a
whole, so that it can be filled and released as one unit; only its routed experts change.
"""

from auto_round.modeling.fused_moe.replace_modules import register_replacement, with_children

replace = register_replacement("Qwen3_5MoeSparseMoeBlock")(with_children)
