"""RWKV: no attention; states run along the tokens, the forward scales weights in place."""

from contract import check_model
from tiny import tiny


def test_rwkv(tmp_path, device):
    model = tiny("rwkv")
    check_model(model, tmp_path, device, blocks={"rwkv.blocks": 2}, layers=2 * 7)
