"""Mixtral: fused in memory, stored one by one as block_sparse_moe.experts.N.w1, w2, w3."""

import pytest
import torch
from contract import check_model
from tiny import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtral(tmp_path, device, dtype):
    model = tiny("mixtral", dtype=dtype)
    result = check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * (4 + 4 * 3), fused=2)
    names = {f"model.layers.1.block_sparse_moe.experts.3.{part}" for part in ("w1", "w2", "w3")}
    assert names <= set(result.layers)
    assert "model.layers.0.block_sparse_moe.gate.weight" in result.stored  # the router, as it was
