"""Qwen 2 MoE: a shared expert with a gate of its own beside the routed ones."""

from contract import check_model
from tiny import tiny


def test_qwen2_moe(tmp_path, device):
    model = tiny("qwen2_moe")
    result = check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * (4 + 4 * 3 + 3), fused=2)
    assert set(result.kept()) == {f"model.layers.{n}.mlp.shared_expert_gate" for n in range(2)}
