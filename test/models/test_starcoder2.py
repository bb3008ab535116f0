"""StarCoder 2: biases everywhere, no gate."""

from contract import check_model
from tiny import tiny


def test_starcoder2(tmp_path, device):
    model = tiny("starcoder2")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * 6)
