"""Llama 4: experts as batched matrices outside the interface, every token weighted before; alone and below images."""

import pytest
from contract import check_model
from tiny import tiny


@pytest.mark.parametrize(
    ("model_type", "task", "blocks"),
    [
        ("llama4_text", "CausalLM", {"model.layers": 2}),
        ("llama4", "ImageTextToText", {"language_model.model.layers": 2}),
    ],
)
def test_llama4(tmp_path, device, model_type, task, blocks):
    model = tiny(model_type, task)
    check_model(model, tmp_path, device, blocks, 2 * (4 + 4 * 3 + 3), fused=2)
