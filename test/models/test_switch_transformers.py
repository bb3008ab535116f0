"""Switch Transformers: an encoder-decoder whose experts are named, not numbered."""

import pytest
from contract import check_model
from tiny import tiny


@pytest.mark.parametrize(
    ("model_type", "blocks"),
    [
        ("switch_transformers", {"encoder.block": 2, "decoder.block": 2}),
        ("nllb-moe", {"model.encoder.layers": 2, "model.decoder.layers": 2}),
    ],
)
def test_switch_transformers(tmp_path, device, model_type, blocks):
    model = tiny(model_type, "Seq2SeqLM")
    check_model(model, tmp_path, device, blocks, (4 + 2) + (4 + 4 * 2) + (8 + 2) + (8 + 4 * 2))
