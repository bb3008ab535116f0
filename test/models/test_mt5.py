"""mT5 and UMT5: gated feed-forward, the latter with a position bias in each block."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"encoder.block": 2, "decoder.block": 2}


@pytest.mark.parametrize("model_type", ["mt5", "umt5"])
def test_mt5(tmp_path, device, model_type):
    model = tiny(model_type, "Seq2SeqLM")
    check_model(model, tmp_path, device, BLOCKS, 2 * (4 + 3) + 2 * (8 + 3))
