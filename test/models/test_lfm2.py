"""LFM 2: short convolutions and attention by turns, dense and sparse."""

import pytest
from contract import check_model
from tiny import tiny


@pytest.mark.parametrize(
    ("model_type", "changes", "blocks", "layers", "fused"),
    [
        (
            "lfm2",
            {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
            {"model.layers": 2},
            (2 + 3) + (4 + 3),
            0,
        ),
        ("lfm2_moe", {}, {"model.layers": 3}, (2 + 3) + (4 + 4 * 3) + (2 + 4 * 3), 2),
    ],
)
def test_lfm2(tmp_path, device, model_type, changes, blocks, layers, fused):
    model = tiny(model_type, **changes)
    check_model(model, tmp_path, device, blocks, layers, fused)
