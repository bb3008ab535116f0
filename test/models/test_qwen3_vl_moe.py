"""Qwen 3 VL: features of the images enter several blocks; experts stored fused, [in, out]."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.language_model.layers": 2}


@pytest.mark.parametrize(
    ("model_type", "layers", "fused"),
    [
        ("qwen3_vl", 2 * 7, 0),
        ("qwen3_vl_moe", 2 * (4 + 4 * 3), 2),
    ],
)
def test_qwen3_vl_moe(tmp_path, device, model_type, layers, fused):
    model = tiny(model_type, "ImageTextToText")
    check_model(model, tmp_path, device, BLOCKS, layers, fused)
