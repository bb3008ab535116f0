"""MiniMax: linear attention whose decay rates differ from block to block, experts as Mixtral stores them."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.layers": 2}


@pytest.mark.parametrize(
    ("model_type", "layers"),
    [
        ("minimax", (4 + 4 * 3) + (3 + 4 * 3)),
        ("minimax_m2", 2 * (4 + 4 * 3)),
    ],
)
def test_minimax(tmp_path, device, model_type, layers):
    model = tiny(model_type)
    check_model(model, tmp_path, device, BLOCKS, layers, fused=2)
