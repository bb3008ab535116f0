"""Voxtral: a language model below an audio tower."""

from contract import check_model
from tiny import tiny


def test_voxtral(tmp_path, device):
    model = tiny("voxtral", "SpeechSeq2Seq")
    check_model(model, tmp_path, device, blocks={"model.language_model.layers": 2}, layers=2 * 7)
