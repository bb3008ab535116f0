"""Bailing: linear and latent attention, dense and sparse blocks."""

from contract import check_model
from tiny import tiny


def test_bailing_hybrid(tmp_path, device):
    model = tiny("bailing_hybrid")
    check_model(
        model, tmp_path, device, blocks={"model.layers": 3}, layers=(6 + 3) + (6 + 4 * 3 + 3) + (4 + 4 * 3 + 3), fused=2
    )
