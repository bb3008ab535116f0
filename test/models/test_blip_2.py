"""BLIP-2: OPT below a query transformer, which needs an image in every sample."""

from contract import check_model
from tiny import tiny


def test_blip_2(tmp_path, device):
    model = tiny("blip-2", "ImageTextToText")
    check_model(model, tmp_path, device, blocks={"language_model.model.decoder.layers": 2}, layers=2 * 6)
