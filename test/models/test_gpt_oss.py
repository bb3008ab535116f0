"""GPT-OSS: gate and up rows interleaved, stored [in, out], with biases, one sink for each head."""

from contract import check_model
from tiny import tiny


def test_gpt_oss(tmp_path, device):
    model = tiny("gpt_oss")
    result = check_model(model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * (4 + 4 * 3), fused=2)
    assert "model.layers.1.mlp.experts.3.gate_proj.bias" in result.stored
    assert not any("gate_up_proj" in name for name in result.stored)
