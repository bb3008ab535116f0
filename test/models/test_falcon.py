"""Falcon: its linear is a subclass of nn.Linear; one key and value head, then a new decoder layout, and ALiBi."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"transformer.h": 2}


@pytest.mark.parametrize("changes", [{}, {"new_decoder_architecture": True, "num_kv_heads": 2}, {"alibi": True}])
def test_falcon(tmp_path, device, changes):
    model = tiny("falcon", **changes)
    check_model(model, tmp_path, device, BLOCKS, 2 * 4)
