"""OLMoE and FlexOLMo: norms over queries and keys, experts of the interface."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.layers": 2}


@pytest.mark.parametrize("model_type", ["olmoe", "flex_olmo"])
def test_olmoe(tmp_path, device, model_type):
    model = tiny(model_type)
    check_model(model, tmp_path, device, BLOCKS, 2 * (4 + 4 * 3), fused=2)
