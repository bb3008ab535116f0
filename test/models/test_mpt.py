"""MPT: ALiBi as an argument of every block, no biases."""

from contract import check_model
from tiny import tiny


def test_mpt(tmp_path, device):
    model = tiny("mpt")
    check_model(model, tmp_path, device, blocks={"transformer.blocks": 2}, layers=2 * 4)
