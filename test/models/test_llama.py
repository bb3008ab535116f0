"""Llama: the plain case, with and without tied embeddings and biases, in single and half precision."""

import pytest
import torch
from contract import check_model
from tiny import tiny_llama

BLOCKS = {"model.layers": 2}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_llama(tmp_path, device, changes):
    check_model(tiny_llama(**changes), tmp_path, device, BLOCKS, 2 * 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_llama_in_half_precision(tmp_path, device, dtype):
    check_model(tiny_llama(dtype), tmp_path, device, BLOCKS, 2 * 7)
