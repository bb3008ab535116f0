"""BART: learned positions with an offset, an encoder; and the decoder alone."""

import pytest
from contract import check_model
from tiny import tiny


@pytest.mark.parametrize(
    ("task", "blocks", "layers"),
    [
        ("Seq2SeqLM", {"model.encoder.layers": 2, "model.decoder.layers": 2}, 2 * (4 + 2) + 2 * (8 + 2)),
        ("CausalLM", {"model.decoder.layers": 2}, 2 * (8 + 2)),
    ],
)
def test_bart(tmp_path, device, task, blocks, layers):
    model = tiny("bart", task)
    check_model(model, tmp_path, device, blocks, layers)
