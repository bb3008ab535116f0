"""Zamba: one transformer shared by several blocks; bare matrices for each head of its state space layers."""

from contract import check_model
from tiny import tiny


def test_zamba(tmp_path, device):
    model = tiny("zamba")
    check_model(
        model,
        tmp_path,
        device,
        blocks={"model.layers": 4},
        layers=2 * (2 + 2 * 2) + (7 + 1 + 2 + 2 * 2) + (1 + 2 + 2 * 2),
        fused=4,
    )
