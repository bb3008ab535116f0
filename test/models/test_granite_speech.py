"""Granite Speech: a language model below an audio tower, with adapters that stay."""

from contract import check_model
from tiny import tiny


def test_granite_speech(tmp_path, device):
    model = tiny("granite_speech", "SpeechSeq2Seq")
    check_model(model, tmp_path, device, blocks={"model.language_model.layers": 2}, layers=2 * 7)
