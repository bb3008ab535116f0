"""Mistral 4: latent attention, experts stored fused."""

from contract import check_model
from tiny import tiny


def test_mistral4(tmp_path, device):
    model = tiny("mistral4", "ImageTextToText")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * (5 + 4 * 3 + 3), fused=2)
