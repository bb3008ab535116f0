"""GLM-4 MoE: a dense block before sparse ones."""

from contract import check_model
from tiny import tiny


def test_glm4_moe(tmp_path, device):
    model = tiny("glm4_moe")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=(4 + 3) + (4 + 4 * 3 + 3), fused=1)
