"""Gemma 3: two rotary tables, local and global, chosen block by block; alone and below images."""

import pytest
from contract import check_model
from tiny import tiny


@pytest.mark.parametrize(
    ("model_type", "task", "changes", "blocks"),
    [
        (
            "gemma3_text",
            "CausalLM",
            {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
            {"model.layers": 2},
        ),
        ("gemma3", "ImageTextToText", {}, {"model.language_model.layers": 2}),
    ],
)
def test_gemma3(tmp_path, device, model_type, task, changes, blocks):
    model = tiny(model_type, task, **changes)
    check_model(model, tmp_path, device, blocks, 2 * 7)
