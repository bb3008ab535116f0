"""GPT-NeoX: one fused query/key/value matrix, attention beside feed-forward."""

from contract import check_model
from tiny import tiny


def test_gpt_neox(tmp_path, device):
    model = tiny("gpt_neox")
    check_model(model, tmp_path, device, blocks={"gpt_neox.layers": 2}, layers=2 * 4)
