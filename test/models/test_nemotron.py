"""Nemotron: squared ReLU, no gate."""

from contract import check_model
from tiny import tiny


def test_nemotron(tmp_path, device):
    model = tiny("nemotron")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * 6)
