"""Bamba: Mamba 2 and attention by turns."""

from contract import check_model
from tiny import tiny


def test_bamba(tmp_path, device):
    model = tiny("bamba")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=(2 + 3) + (4 + 3))
