"""Reformer: reversible blocks that pass two streams, local and hashed attention."""

from contract import check_model
from tiny import tiny


def test_reformer(tmp_path, device):
    model = tiny("reformer")
    check_model(model, tmp_path, device, blocks={"reformer.encoder.layers": 2}, layers=(4 + 2) + (3 + 2))
