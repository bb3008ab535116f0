"""Phi-3: fused query/key/value and gate/up projections, kept fused."""

from contract import check_model
from tiny import VOCABULARY, random_model
from transformers import Phi3Config


def test_phi3(tmp_path, device):
    config = Phi3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        pad_token_id=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    check_model(random_model(config), tmp_path, device, {"model.layers": 2}, 2 * 4)
