"""DeepSeek-V2: experts in the plain layout of Transformers' experts interface.

`gate_up_proj [E, 2I, H]`, gate rows first, and `down_proj [E, H, I]`; checkpoints store `experts.N.gate_proj`,
`up_proj` and `down_proj`. Named here for versions of Transformers in which the class lacks the interface's attributes.
"""

from auto_round.modeling.fused_moe.replace_modules import register_replacement
from auto_round.modeling.fused_moe.structure import unfuse_interface

replace = register_replacement("DeepseekV2Experts")(unfuse_interface)
