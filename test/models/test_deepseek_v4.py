"""DeepSeek V4: several hidden states, compressed keys, a matrix for each group of heads, hashed experts."""

from contract import check_model
from tiny import tiny


def test_deepseek_v4(tmp_path, device):
    model = tiny("deepseek_v4")
    check_model(
        model,
        tmp_path,
        device,
        blocks={"model.layers": 3},
        layers=(7 + 4 * 3 + 3) + (10 + 4 * 3 + 3) + (7 + 4 * 3 + 3),
        fused=3,
    )
