"""Jamba: state space and attention, dense and sparse feed-forward, in all combinations."""

from contract import check_model
from tiny import tiny


def test_jamba(tmp_path, device):
    model = tiny("jamba")
    check_model(
        model,
        tmp_path,
        device,
        blocks={"model.layers": 4},
        layers=(4 + 3) + (4 + 4 * 3) + (4 + 3) + (4 + 4 * 3),
        fused=2,
    )
