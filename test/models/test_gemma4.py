"""Gemma 4: inputs of each layer, attention of two widths; alone and below images."""

import pytest
from contract import check_model
from tiny import tiny


@pytest.mark.parametrize(
    ("model_type", "task", "blocks"),
    [
        ("gemma4_text", "CausalLM", {"model.layers": 2}),
        ("gemma4", "ImageTextToText", {"model.language_model.layers": 2}),
    ],
)
def test_gemma4(tmp_path, device, model_type, task, blocks):
    model = tiny(model_type, task)
    check_model(model, tmp_path, device, blocks, 2 * 9)
