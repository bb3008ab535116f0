"""Qwen 2 VL and 2.5 VL: positions in three dimensions."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.language_model.layers": 2}


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_qwen2_vl(tmp_path, device, model_type):
    model = tiny(model_type, "ImageTextToText")
    check_model(model, tmp_path, device, BLOCKS, 2 * 7)
