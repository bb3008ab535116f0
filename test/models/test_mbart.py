"""mBART and M2M-100: norms before each part."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.encoder.layers": 2, "model.decoder.layers": 2}


@pytest.mark.parametrize("model_type", ["mbart", "m2m_100"])
def test_mbart(tmp_path, device, model_type):
    model = tiny(model_type, "Seq2SeqLM")
    check_model(model, tmp_path, device, BLOCKS, 2 * (4 + 2) + 2 * (8 + 2))
