"""MusicGen's decoder: one code book a row, one head for each code book."""

from contract import check_model
from tiny import tiny


def test_musicgen(tmp_path, device):
    check_model(tiny("musicgen"), tmp_path, device, blocks={"model.decoder.layers": 2}, layers=2 * (8 + 2))
