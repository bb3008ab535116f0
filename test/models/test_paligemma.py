"""PaliGemma: a prefix that is seen from both sides."""

from contract import check_model
from tiny import tiny


def test_paligemma(tmp_path, device):
    model = tiny("paligemma", "ImageTextToText")
    check_model(model, tmp_path, device, blocks={"model.language_model.layers": 2}, layers=2 * 7)
