"""GLM-4V: a gate and up projection in one matrix, positions in three dimensions, dense and sparse."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.language_model.layers": 2}


@pytest.mark.parametrize(
    ("model_type", "layers", "fused"),
    [
        ("glm4v", 2 * 6, 0),
        ("glm4v_moe", (4 + 3) + (4 + 4 * 3 + 3), 1),
    ],
)
def test_glm4v(tmp_path, device, model_type, layers, fused):
    model = tiny(model_type, "ImageTextToText")
    check_model(model, tmp_path, device, BLOCKS, layers, fused)
