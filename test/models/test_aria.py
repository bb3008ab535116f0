"""Aria: experts stored [in, out] and fused, shared experts, below images."""

import pytest
from contract import check_model
from tiny import tiny


@pytest.mark.parametrize(
    ("model_type", "task", "blocks"),
    [
        ("aria_text", "CausalLM", {"model.layers": 2}),
        ("aria", "ImageTextToText", {"model.language_model.layers": 2}),
    ],
)
def test_aria(tmp_path, device, model_type, task, blocks):
    model = tiny(model_type, task)
    check_model(model, tmp_path, device, blocks, 2 * (4 + 4 * 3 + 3), fused=2)
