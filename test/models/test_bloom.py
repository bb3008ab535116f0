"""BLOOM: the residual is an argument of sub-modules, ALiBi, one fused query/key/value matrix."""

from contract import check_model
from tiny import tiny


def test_bloom(tmp_path, device):
    model = tiny("bloom")
    check_model(model, tmp_path, device, blocks={"transformer.h": 2}, layers=2 * 4)
