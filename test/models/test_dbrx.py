"""DBRX: all experts' rows in one matrix of two dimensions, gate, up and down."""

from contract import check_model
from tiny import tiny


def test_dbrx(tmp_path, device):
    model = tiny("dbrx")
    check_model(model, tmp_path, device, blocks={"transformer.blocks": 2}, layers=2 * (2 + 4 * 3), fused=2)
