"""Zamba 2: one transformer shared by several blocks, with an adapter for each of its places."""

from contract import check_model
from tiny import tiny


def test_zamba2(tmp_path, device):
    model = tiny("zamba2")
    check_model(model, tmp_path, device, blocks={"model.layers": 4}, layers=2 * 2 + (1 + 2 + 4 + 2 + 4) + (1 + 2))
