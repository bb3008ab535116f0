"""JetMoE: experts in the attention as well, each behind linears of three dimensions."""

from contract import check_model
from tiny import tiny


def test_jetmoe(tmp_path, device):
    model = tiny("jetmoe")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * (4 + 4 + 4 + 4 + 1), fused=8)
