"""Moshi: layers inside a wrapper that chooses among several."""

from contract import check_model
from tiny import tiny


def test_moshi(tmp_path, device):
    model = tiny("moshi")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * (4 + 2))
