"""BERT and its relatives as decoders."""

import pytest
from contract import check_model
from tiny import tiny


@pytest.mark.parametrize(
    ("model_type", "changes", "blocks"),
    [
        ("bert", {"is_decoder": True}, {"bert.encoder.layer": 2}),
        ("electra", {"is_decoder": True}, {"electra.encoder.layer": 2}),
    ],
)
def test_bert(tmp_path, device, model_type, changes, blocks):
    model = tiny(model_type, **changes)
    check_model(model, tmp_path, device, blocks, 2 * 6)
