"""Persimmon: fused query/key/value with heads interleaved, norms over heads."""

from contract import check_model
from tiny import tiny


def test_persimmon(tmp_path, device):
    model = tiny("persimmon")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * 4)
