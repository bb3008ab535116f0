"""Dia: a token for each channel at every place of the decoder, whose projections are linears of several axes."""

from contract import check_model
from tiny import tiny


def test_dia(tmp_path, device):
    model = tiny("dia", "SpeechSeq2Seq")
    check_model(
        model,
        tmp_path,
        device,
        blocks={"model.encoder.layers": 2, "model.decoder.layers": 2},
        layers=2 * (4 + 2) + 2 * (8 + 2),
    )
