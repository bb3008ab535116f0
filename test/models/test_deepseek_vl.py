"""DeepSeek-VL: a language model below images."""

from contract import check_model
from tiny import tiny


def test_deepseek_vl(tmp_path, device):
    model = tiny("deepseek_vl", "ImageTextToText")
    check_model(model, tmp_path, device, blocks={"model.language_model.layers": 2}, layers=2 * 7)
