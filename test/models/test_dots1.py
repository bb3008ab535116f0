"""dots.llm1: shared and routed experts of the interface."""

from contract import check_model
from tiny import tiny


def test_dots1(tmp_path, device):
    model = tiny("dots1")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * (4 + 4 * 3 + 3), fused=2)
