"""Nemotron-H: blocks of one kind each (state space, experts without gate, attention, feed-forward)."""

from contract import check_model
from tiny import tiny


def test_nemotron_h(tmp_path, device):
    model = tiny("nemotron_h")
    check_model(model, tmp_path, device, blocks={"model.layers": 4}, layers=2 + (4 * 2 + 2) + 4 + 2, fused=1)
