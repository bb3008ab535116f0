"""OPT: learned positions, biases, a decoder nested one level deeper."""

from contract import check_model
from tiny import VOCABULARY, random_model
from transformers import OPTConfig


def test_opt(tmp_path, device):
    config = OPTConfig(
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        word_embed_proj_dim=64,
    )
    check_model(random_model(config), tmp_path, device, {"model.decoder.layers": 2}, 2 * 6)
