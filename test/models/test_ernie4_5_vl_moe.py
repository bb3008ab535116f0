"""ERNIE 4.5 VL: experts for text beside experts for images, which text does not reach."""

from contract import check_model
from tiny import tiny


def test_ernie4_5_vl_moe(tmp_path, device):
    model = tiny("ernie4_5_vl_moe", "ImageTextToText")
    check_model(
        model,
        tmp_path,
        device,
        blocks={"model.language_model.layers": 2},
        layers=(4 + 3) + (4 + 4 * 3 + 4 * 3 + 3),
        fused=2,
    )
