"""Phi: attention beside feed-forward, rotary positions on a part of the heads, a head with bias."""

from contract import check_model
from tiny import tiny


def test_phi(tmp_path, device):
    model = tiny("phi")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * 6)
