"""Qwen 3: query and key norms, no attention bias."""

from contract import check_model
from tiny import VOCABULARY, random_model
from transformers import Qwen3Config


def test_qwen3(tmp_path, device):
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
    )
    check_model(random_model(config), tmp_path, device, {"model.layers": 2}, 2 * 7)
