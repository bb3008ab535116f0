"""xLSTM: matrix memories; the gates of the cells are as few as the heads."""

from contract import check_model
from tiny import tiny


def test_xlstm(tmp_path, device):
    model = tiny("xlstm")
    check_model(model, tmp_path, device, blocks={"backbone.blocks": 2}, layers=2 * (5 + 3))
