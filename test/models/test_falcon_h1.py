"""Falcon-H1: state space and attention in the same block."""

from contract import check_model
from tiny import tiny


def test_falcon_h1(tmp_path, device):
    model = tiny("falcon_h1")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * (3 + 2 + 4))
