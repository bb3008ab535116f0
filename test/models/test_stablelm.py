"""StableLM: rotary positions on a part of the heads."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.layers": 2}


@pytest.mark.parametrize("changes", [{}, {"use_parallel_residual": True, "qk_layernorm": True}])
def test_stablelm(tmp_path, device, changes):
    model = tiny("stablelm", **changes)
    check_model(model, tmp_path, device, BLOCKS, 2 * 7)
