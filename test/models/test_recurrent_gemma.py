"""RecurrentGemma: linear recurrences and local attention."""

from contract import check_model
from tiny import tiny


def test_recurrent_gemma(tmp_path, device):
    model = tiny("recurrent_gemma")
    check_model(model, tmp_path, device, blocks={"model.layers": 3}, layers=2 * (3 + 3) + (4 + 3))
