"""GLM MoE with sparse attention: an indexer hands what it chose from block to block."""

from contract import check_model
from tiny import tiny


def test_glm_moe_dsa(tmp_path, device):
    model = tiny("glm_moe_dsa")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=(7 + 3) + (7 + 4 * 3 + 3), fused=1)
