"""Gemma 3n: inputs of each layer beside the hidden state, parallel hidden states, keys shared by the last blocks."""

from contract import check_model
from tiny import tiny


def test_gemma3n(tmp_path, device):
    model = tiny("gemma3n_text")
    result = check_model(
        model,
        tmp_path,
        device,
        blocks={"model.altup_projections": 3, "model.layers": 6, "model.altup_unembed_projections": 3},
        layers=3 + 4 * 11 + 2 * 9 + 3,
    )
    # The two last blocks have no keys and values of their own: they read those of earlier ones.
    assert "model.layers.5.self_attn.q_proj" in result.layers
    assert "model.layers.5.self_attn.k_proj" not in result.layers
