"""T5Gemma: Gemma's blocks with cross attention, then the second with one attention for both."""

import pytest
from contract import check_model
from tiny import tiny


@pytest.mark.parametrize(
    ("model_type", "task", "blocks", "layers"),
    [
        ("t5gemma", "Seq2SeqLM", {"model.encoder.layers": 2, "model.decoder.layers": 2}, 2 * 7 + 2 * 11),
        (
            "t5gemma2",
            "ImageTextToText",
            {"model.encoder.text_model.layers": 2, "model.decoder.layers": 2},
            2 * 7 + 2 * 7,
        ),
    ],
)
def test_t5gemma(tmp_path, device, model_type, task, blocks, layers):
    model = tiny(model_type, task)
    check_model(model, tmp_path, device, blocks, layers)
