"""KOSMOS-2: image embeddings at marked places of the text."""

from contract import check_model
from tiny import tiny


def test_kosmos_2(tmp_path, device):
    model = tiny("kosmos-2", "ImageTextToText")
    check_model(model, tmp_path, device, blocks={"text_model.model.layers": 2}, layers=2 * 6)
