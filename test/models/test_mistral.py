"""Mistral: a window over the attention, so the mask is not the plain triangle."""

from contract import check_model
from tiny import tiny


def test_mistral(tmp_path, device):
    model = tiny("mistral", sliding_window=8)
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * 7)
