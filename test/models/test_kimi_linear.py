"""Kimi Linear: delta attention with low-rank gates, latent attention, dense and sparse blocks."""

from contract import check_model
from tiny import tiny


def test_kimi_linear(tmp_path, device):
    model = tiny("kimi_linear")
    check_model(
        model, tmp_path, device, blocks={"model.layers": 3}, layers=(8 + 3) + (8 + 4 * 3 + 3) + (4 + 4 * 3 + 3), fused=2
    )
