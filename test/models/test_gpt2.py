"""GPT-2: Conv1D layers (weights stored [in, out]), biases, tied embeddings."""

from contract import check_model
from tiny import VOCABULARY, random_model
from transformers import GPT2Config


def test_gpt2(tmp_path, device):
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_inner=128, vocab_size=VOCABULARY, n_positions=128)
    check_model(random_model(config), tmp_path, device, {"transformer.h": 2}, 2 * 4)
