"""Idefics 3 and SmolVLM: the language model is called text_model."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.text_model.layers": 2}


@pytest.mark.parametrize("model_type", ["idefics3", "smolvlm"])
def test_idefics3(tmp_path, device, model_type):
    model = tiny(model_type, "ImageTextToText")
    check_model(model, tmp_path, device, BLOCKS, 2 * 7)
