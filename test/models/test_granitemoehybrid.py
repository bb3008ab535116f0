"""Granite 4: Mamba 2 and attention by turns, shared and routed experts behind linears of three dimensions."""

from contract import check_model
from tiny import tiny


def test_granitemoehybrid(tmp_path, device):
    model = tiny("granitemoehybrid")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=(2 + 2 + 4 * 3) + (4 + 2 + 4 * 3), fused=2)
