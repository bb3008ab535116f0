"""DeepSeek V2: latent attention, shared and routed experts, with and without a dense block before."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.layers": 2}


@pytest.mark.parametrize(
    ("changes", "layers", "fused"),
    [
        ({}, 2 * (5 + 4 * 3 + 3), 2),
        ({"first_k_dense_replace": 1}, (5 + 3) + (5 + 4 * 3 + 3), 1),
    ],
)
def test_deepseek_v2(tmp_path, device, changes, layers, fused):
    model = tiny("deepseek_v2", **changes)
    check_model(model, tmp_path, device, BLOCKS, layers, fused)
