"""Gemma 2: alternating sliding and full attention, so blocks get different masks."""

from contract import check_model
from tiny import VOCABULARY, random_model
from transformers import Gemma2Config


def test_gemma2(tmp_path, device):
    config = Gemma2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        sliding_window=8,
    )
    check_model(random_model(config), tmp_path, device, {"model.layers": 2}, 2 * 7)
