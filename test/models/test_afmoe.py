"""AFMoE: a gate over the attention's output, a dense block before sparse ones."""

from contract import check_model
from tiny import tiny


def test_afmoe(tmp_path, device):
    model = tiny("afmoe")
    result = check_model(
        model, tmp_path, device, blocks={"model.layers": 3}, layers=(5 + 3) + 2 * (5 + 3 + 4 * 3), fused=2
    )
    assert set(result.kept()) == {f"model.layers.{n}.mlp.router.gate" for n in (1, 2)}
