"""EXAONE 4: norms after each part, blocks with and without rotary positions."""

from contract import check_model
from tiny import tiny


def test_exaone4(tmp_path, device):
    model = tiny("exaone4")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * 7)
