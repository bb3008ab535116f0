"""Qwen 2: biases on query, key and value alone."""

from contract import check_model
from tiny import tiny


def test_qwen2(tmp_path, device):
    model = tiny("qwen2")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * 7)
