"""Mistral 3: a language model below images."""

from contract import check_model
from tiny import tiny


def test_mistral3(tmp_path, device):
    model = tiny("mistral3", "ImageTextToText")
    check_model(model, tmp_path, device, blocks={"model.language_model.layers": 2}, layers=2 * 7)
