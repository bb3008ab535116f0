"""Pix2Struct: an encoder of image patches that is part of the text model."""

from contract import check_model
from tiny import tiny


def test_pix2struct(tmp_path, device):
    model = tiny("pix2struct", "ImageTextToText")
    check_model(
        model,
        tmp_path,
        device,
        blocks={"encoder.encoder.layer": 2, "decoder.layer": 2},
        layers=2 * (4 + 3) + 2 * (8 + 3),
    )
