"""Mamba: the forward reads the weight of its layers instead of calling them."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"backbone.layers": 2}


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba"])
def test_mamba(tmp_path, device, model_type):
    model = tiny(model_type)
    check_model(model, tmp_path, device, BLOCKS, 2 * 4)
