"""Qwen 3 Omni: thinker and talker, both with experts; the talker's are taken apart, and stay as they are."""

from contract import check_model
from tiny import tiny


def test_thinker(tmp_path, device):
    model = tiny("qwen3_omni_moe_thinker", "ImageTextToText")
    check_model(model, tmp_path, device, {"model.language_model.layers": 2}, layers=2 * (4 + 4 * 3), fused=2)


def test_qwen3_omni_moe(tmp_path, device):
    model = tiny("qwen3_omni_moe", "MultimodalLM")
    blocks = {"thinker.model.language_model.layers": 2}
    result = check_model(model, tmp_path, device, blocks, layers=2 * (4 + 4 * 3), fused=2 + 2)
    assert not any(name.startswith("talker.") for name in result.layers)
    assert "talker.model.layers.0.mlp.experts.0.down_proj.weight" in result.stored
