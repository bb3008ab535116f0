"""Step 3.7: linears of three dimensions for the experts, a gate for each head, below images."""

from contract import check_model
from tiny import tiny


def test_step3p7(tmp_path, device):
    model = tiny("step3p7", "ImageTextToText")
    check_model(
        model, tmp_path, device, blocks={"model.language_model.layers": 2}, layers=(4 + 3) + (4 + 4 * 3 + 3), fused=1
    )
