"""CTRL: positions from a table that is no parameter, layers in a Sequential."""

from contract import check_model
from tiny import tiny


def test_ctrl(tmp_path, device):
    model = tiny("ctrl")
    check_model(model, tmp_path, device, blocks={"transformer.h": 2}, layers=2 * 6)
