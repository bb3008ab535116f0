"""Pegasus and Marian: positions from a table that is computed, a bias over the logits."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.encoder.layers": 2, "model.decoder.layers": 2}


@pytest.mark.parametrize("model_type", ["pegasus", "marian"])
def test_pegasus(tmp_path, device, model_type):
    model = tiny(model_type, "Seq2SeqLM")
    check_model(model, tmp_path, device, BLOCKS, 2 * (4 + 2) + 2 * (8 + 2))
