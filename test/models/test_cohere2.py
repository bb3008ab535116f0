"""Cohere: attention and feed-forward beside each other, logits scaled; the second with blocks without positions."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.layers": 2}


@pytest.mark.parametrize("model_type", ["cohere", "cohere2"])
def test_cohere2(tmp_path, device, model_type):
    model = tiny(model_type)
    check_model(model, tmp_path, device, BLOCKS, 2 * 7)
