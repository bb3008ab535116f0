"""Chameleon: images as tokens, norms over heads."""

from contract import check_model
from tiny import tiny


def test_chameleon(tmp_path, device):
    model = tiny("chameleon", "ImageTextToText")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * 7)
