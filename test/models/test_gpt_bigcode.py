"""GPT BigCode: one key and value head fused with the queries."""

from contract import check_model
from tiny import tiny


def test_gpt_bigcode(tmp_path, device):
    model = tiny("gpt_bigcode")
    check_model(model, tmp_path, device, blocks={"transformer.h": 2}, layers=2 * 4)
