"""LLaVA and LLaVA-NeXT: a language model below images, quantized with text alone."""

import pytest
from contract import check_model
from tiny import tiny

from auto_round import AutoRound

BLOCKS = {"model.language_model.layers": 2}


@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
def test_llava(tmp_path, device, model_type):
    model = tiny(model_type, "ImageTextToText")
    check_model(model, tmp_path, device, BLOCKS, 2 * 7)


def test_llava_tower():
    model = tiny("llava", "ImageTextToText")
    options = {"scheme": "W4A16", "group_size": 32, "iters": 0, "disable_opt_rtn": True}
    run = AutoRound(model, None, quant_nontext_module=True, **options)
    assert any("vision_tower" in name for name in run.plan.block_names)
    assert any("vision_tower" in name for name in run.plan.quantized())
