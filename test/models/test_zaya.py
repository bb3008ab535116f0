"""Zaya: a router of several layers that hands its state from block to block, one expert that does nothing."""

from contract import check_model
from tiny import tiny

BLOCKS = {"model.layers": 2}


def test_zaya(tmp_path, device):
    check_model(tiny("zaya"), tmp_path, device, BLOCKS, layers=2 * (5 + 4 * 3), fused=2)
