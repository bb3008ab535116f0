"""Llama: the plain case, with and without tied embeddings and biases."""

import pytest
from contract import check_model
from tiny import tiny_llama

BLOCKS = [["model.layers.0", "model.layers.1"]]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_llama(tmp_path, device, changes):
    check_model(tiny_llama(**changes), tmp_path, device, BLOCKS, 14)
