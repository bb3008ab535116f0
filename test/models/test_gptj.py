"""GPT-J and its relative CodeGen: rotary tables among the buffers of each block, attention beside feed-forward."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"transformer.h": 2}


@pytest.mark.parametrize(
    ("model_type", "layers"),
    [
        ("gptj", 2 * 6),
        ("codegen", 2 * 4),
    ],
)
def test_gptj(tmp_path, device, model_type, layers):
    model = tiny(model_type)
    check_model(model, tmp_path, device, BLOCKS, layers)
