"""Gemma: embeddings scaled by the width, norms around 1 + weight, heads tied to the embedding."""

from contract import check_model
from tiny import tiny


def test_gemma(tmp_path, device):
    model = tiny("gemma")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * 7)
