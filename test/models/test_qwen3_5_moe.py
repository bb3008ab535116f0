"""Qwen 3.5: gated delta networks, dense and with experts."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.layers": 2}


@pytest.mark.parametrize(
    ("model_type", "layers", "fused"),
    [
        ("qwen3_5_moe_text", (3 + 4 * 3 + 3) + (4 + 4 * 3 + 3), 2),
        ("qwen3_5_text", (3 + 3) + (4 + 3), 0),
    ],
)
def test_qwen3_5_moe(tmp_path, device, model_type, layers, fused):
    model = tiny(model_type)
    check_model(model, tmp_path, device, BLOCKS, layers, fused)
