"""Qwen 3 Next: linear attention and full attention by turns, both with experts."""

from contract import check_model
from tiny import tiny


def test_qwen3_next(tmp_path, device):
    model = tiny("qwen3_next")
    check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=(2 + 4 * 3 + 3) + (4 + 4 * 3 + 3), fused=2)
