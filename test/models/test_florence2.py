"""Florence 2: an encoder-decoder below images."""

from contract import check_model
from tiny import tiny


def test_florence2(tmp_path, device):
    model = tiny("florence2", "ImageTextToText")
    check_model(
        model,
        tmp_path,
        device,
        blocks={"model.language_model.encoder.layers": 2, "model.language_model.decoder.layers": 2},
        layers=2 * (4 + 2) + 2 * (8 + 2),
    )
