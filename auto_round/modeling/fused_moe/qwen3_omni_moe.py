"""Qwen3-Omni MoE: the blocks of the thinker (routed experts only) and of the talker (with a gated shared expert).

Both hold `experts.gate_up_proj [E, 2I, H]`, gate rows first, and `experts.down_proj [E, H, I]`; checkpoints store
`experts.N.gate_proj`, `up_proj` and `down_proj` for both.
"""

from auto_round.modeling.fused_moe.replace_modules import register_replacement, with_children

replace = register_replacement("Qwen3OmniMoeThinkerTextSparseMoeBlock")(with_children)
register_replacement("Qwen3OmniMoeTalkerTextSparseMoeBlock")(with_children)
