"""Mamba 2: one input projection for everything, a gated norm before the output."""

from contract import check_model
from tiny import tiny


def test_mamba2(tmp_path, device):
    model = tiny("mamba2")
    check_model(model, tmp_path, device, blocks={"backbone.layers": 2}, layers=2 * 2)
