"""Streaming: a model of many shards runs block by block as Transformers runs it whole."""

import torch
from tiny import VOCABULARY, save_tiny, tiny_llama
from transformers import AutoModelForCausalLM

from auto_round.utils.model import find_layers, get_block_names, load_streamed


def test_streamed_equals_whole(tmp_path, device):
    folder = save_tiny(tiny_llama(torch.bfloat16, num_hidden_layers=4), tmp_path / "m", shard="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 4
    streamed = load_streamed(folder, device=device)
    blocks = get_block_names(streamed.model)[0]
    streamed.set_blocks(tuple(blocks))
    present = []

    def count(block, module):
        loaded = [b for b in blocks if next(streamed.model.get_submodule(b).parameters()).device.type != "meta"]
        present.append(loaded)

    batch = torch.randint(0, VOCABULARY, (2, 16), device=device)
    with torch.no_grad(), streamed.streaming(count) as model:
        logits = model(batch).logits
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)
    with torch.no_grad():
        assert torch.equal(logits, whole(batch).logits)
    assert present == [[block] for block in blocks]
    assert all(p.device.type == "meta" for b in blocks for p in model.get_submodule(b).parameters())


def test_tied_embeddings_are_found(tmp_path):
    streamed = load_streamed(save_tiny(tiny_llama(tie_word_embeddings=True), tmp_path / "m"))
    layers = find_layers(streamed.model, get_block_names(streamed.model))
    assert [info.name for info in layers if info.tied] == ["lm_head"]
