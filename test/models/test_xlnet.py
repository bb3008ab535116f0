"""XLNet: two streams; the attention's matrices are bare parameters of three dimensions."""

from contract import check_model
from tiny import tiny


def test_xlnet(tmp_path, device):
    model = tiny("xlnet")
    check_model(model, tmp_path, device, blocks={"transformer.layer": 2}, layers=2 * 2)
