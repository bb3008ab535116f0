"""SmolLM 3: blocks without rotary positions among others."""

from contract import check_model
from tiny import tiny


def test_smollm3(tmp_path, device):
    model = tiny("smollm3")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * 7)
