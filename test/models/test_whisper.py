"""Whisper: samples are spectrograms and the decoder's ids, so text alone does not tell the blocks."""

from contract import check_model
from tiny import tiny


def test_whisper(tmp_path, device):
    model = tiny("whisper", "SpeechSeq2Seq")
    check_model(
        model,
        tmp_path,
        device,
        blocks={"model.encoder.layers": 2, "model.decoder.layers": 2},
        layers=2 * (4 + 2) + 2 * (8 + 2),
    )
