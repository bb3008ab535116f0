"""TrOCR: a decoder without its encoder."""

from contract import check_model
from tiny import tiny


def test_trocr(tmp_path, device):
    model = tiny("trocr")
    check_model(model, tmp_path, device, blocks={"model.decoder.layers": 2}, layers=2 * (8 + 2))
