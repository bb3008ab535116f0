"""InternLM 3: a bias on the outputs of attention only as configured."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.layers": 2}


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "bias": True}])
def test_internlm3(tmp_path, device, changes):
    model = tiny("internlm3", **changes)
    check_model(model, tmp_path, device, BLOCKS, 2 * 7)
