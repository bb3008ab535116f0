"""Qwen 2.5 Omni: a thinker and a talker; the whole model can only generate. The thinker alone is a type of its own."""

from contract import check_model
from tiny import tiny


def test_thinker(tmp_path, device):
    model = tiny("qwen2_5_omni_thinker", "ImageTextToText")
    check_model(model, tmp_path, device, blocks={"model.language_model.layers": 2}, layers=2 * 7)


def test_qwen2_5_omni(tmp_path, device, monkeypatch):
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    model = tiny("qwen2_5_omni", "MultimodalLM", talker_config={"rope_parameters": rope})
    monkeypatch.setattr(type(model), "load_speakers", lambda *args: None)
    blocks, files = {"thinker.model.language_model.layers": 2}, {"spk_dict.pt": b"voices"}
    check_model(model, tmp_path, device, blocks, layers=2 * 7, files=files)
