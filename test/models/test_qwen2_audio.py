"""Qwen 2 Audio: a language model below an audio tower."""

from contract import check_model
from tiny import tiny


def test_qwen2_audio(tmp_path, device):
    model = tiny("qwen2_audio", "Seq2SeqLM")
    check_model(model, tmp_path, device, blocks={"model.language_model.layers": 2}, layers=2 * 7)
