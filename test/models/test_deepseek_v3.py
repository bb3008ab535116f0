"""DeepSeek V3: a dense block before sparse ones; the router's correction bias is a buffer. V3.2 adds an indexer."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.layers": 2}


@pytest.mark.parametrize(
    ("model_type", "layers"),
    [
        ("deepseek_v3", (5 + 3) + (5 + 4 * 3 + 3)),
        ("deepseek_v32", (7 + 3) + (7 + 4 * 3 + 3)),
    ],
)
def test_deepseek_v3(tmp_path, device, model_type, layers):
    model = tiny(model_type)
    check_model(model, tmp_path, device, BLOCKS, layers, fused=1)
