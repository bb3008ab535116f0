"""Granite MoE: experts behind one linear of three dimensions, with and without a shared one."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.layers": 2}


@pytest.mark.parametrize(
    ("model_type", "changes", "layers"),
    [
        ("granitemoe", {}, 2 * (4 + 4 * 3)),
        ("granitemoeshared", {"shared_intermediate_size": 256}, 2 * (4 + 4 * 3 + 2)),
    ],
)
def test_granitemoe(tmp_path, device, model_type, changes, layers):
    model = tiny(model_type, **changes)
    check_model(model, tmp_path, device, BLOCKS, layers, fused=2)
