"""Hunyuan: a shared feed-forward beside the experts; and the dense type."""

import pytest
from contract import check_model
from tiny import tiny

BLOCKS = {"model.layers": 2}


@pytest.mark.parametrize(
    ("model_type", "changes", "layers", "fused"),
    [
        ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}, 2 * (4 + 4 * 3 + 3), 2),
        ("hunyuan_v1_dense", {}, 2 * 7, 0),
    ],
)
def test_hunyuan_v1_moe(tmp_path, device, model_type, changes, layers, fused):
    model = tiny(model_type, **changes)
    check_model(model, tmp_path, device, BLOCKS, layers, fused)
