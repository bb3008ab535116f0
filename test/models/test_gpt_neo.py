"""GPT-Neo: global and local attention by turns, below a module of its own."""

from contract import check_model
from tiny import tiny


def test_gpt_neo(tmp_path, device):
    model = tiny("gpt_neo")
    check_model(model, tmp_path, device, blocks={"transformer.h": 2}, layers=2 * 6)
