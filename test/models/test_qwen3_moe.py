"""Qwen 3 MoE: the plain case of Transformers' experts interface; one type with a block that is not sparse."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.layers": 2}


@pytest.mark.parametrize(
    ("changes", "layers", "fused"),
    [
        ({}, 2 * (4 + 4 * 3), 2),
        ({"mlp_only_layers": [0]}, (4 + 3) + (4 + 4 * 3), 1),
    ],
)
def test_qwen3_moe(tmp_path, device, changes, layers, fused):
    model = tiny("qwen3_moe", **changes)
    check_model(model, tmp_path, device, BLOCKS, layers, fused)
