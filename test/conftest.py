"""Shared fixtures: no network, few threads (tests run side by side), and the devices that there are."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `from tiny import …`, `from contract import …` in sub-folders too
torch.set_num_threads(1)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture
def tiny_dir(tmp_path):
    """A tiny random Llama with its tokenizer, as a model folder."""
    from tiny import save_tiny, tiny_llama

    return save_tiny(tiny_llama(), tmp_path / "tiny")
