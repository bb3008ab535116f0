"""OLMo 2: norms after attention and feed-forward, and over whole queries and keys."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.layers": 2}


@pytest.mark.parametrize("model_type", ["olmo2", "olmo3"])
def test_olmo2(tmp_path, device, model_type):
    model = tiny(model_type)
    check_model(model, tmp_path, device, BLOCKS, 2 * 7)
