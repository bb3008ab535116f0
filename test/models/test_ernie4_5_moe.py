"""ERNIE 4.5: a dense block before sparse ones, a correction bias in the router; and the dense type."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.layers": 2}


@pytest.mark.parametrize(
    ("model_type", "layers", "fused"),
    [
        ("ernie4_5_moe", (4 + 3) + (4 + 4 * 3 + 3), 1),
        ("ernie4_5", 2 * 7, 0),
    ],
)
def test_ernie4_5_moe(tmp_path, device, model_type, layers, fused):
    model = tiny(model_type)
    check_model(model, tmp_path, device, BLOCKS, layers, fused)
