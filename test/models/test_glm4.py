"""GLM-4: gate and up projection in one matrix, norms before and after each part."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.layers": 2}


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_glm4(tmp_path, device, model_type):
    model = tiny(model_type)
    check_model(model, tmp_path, device, BLOCKS, 2 * 6)
