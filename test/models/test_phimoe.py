"""Phi-MoE: the router has noise in training, experts are stored as Mixtral's."""

from contract import check_model
from tiny import tiny


def test_phimoe(tmp_path, device):
    model = tiny("phimoe")
    result = check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * (4 + 4 * 3), fused=2)
    assert set(result.kept().values()) == {"router: small, and it decides"}
