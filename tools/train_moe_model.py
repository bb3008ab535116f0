"""Train the small mixture of experts that the frontier of quality and time is measured on.

Experts are quantized on the few tokens that a router sends them, and only a router that was really trained sends them
as in a real model. This script trains a Qwen3-MoE with the tokenizer of the demo model, on one CPU core, and writes
beside it calibration records and a test text that share no document with what it was trained on. It is no asset. Usage:

    python tools/train_moe_model.py --cache CACHE --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")

import torch
from corpus import Document, documents
from tokenizers import Tokenizer
from training import (
    EOS,
    PAD,
    SEPARATOR,
    Settings,
    add_settings,
    outputs_of,
    pack,
    prediction_loss,
    settings_of,
    show_samples,
    split_texts,
    train_into,
)
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

TOKENIZER = Path(__file__).resolve().parent.parent / "auto_round" / "assets" / "demo_model"
SOURCES = ("sotu", "moby-dick", "austen", "sqlite-docs", "django")  # those that no point release of Debian replaces
BALANCE = 0.01
SHORTEST_RECORD = 512  # tokens, since loaders drop what is shorter than a calibration sample


def new_model(tokenizer: Tokenizer) -> Qwen3MoeForCausalLM:
    """A freshly initialised mixture of 8 experts a layer, of which each token meets two."""
    config = Qwen3MoeConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return Qwen3MoeForCausalLM(config)


def balanced_loss(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """The loss of the next token, and what it costs to send tokens to the same few experts."""
    outputs = outputs_of(model, rows, output_router_logits=True)
    return prediction_loss(outputs.logits, rows) + BALANCE * outputs.aux_loss


def calibration_lines(found: list[Document], tokenizer: Tokenizer) -> list[str]:
    """JSON lines of the documents kept for calibration that are long enough, mixed by digest."""
    chosen = sorted((d for d in found if d.split == "calibration"), key=lambda d: d.digest)
    long_enough = [d for d in chosen if len(tokenizer.encode(d.text).ids) >= SHORTEST_RECORD]
    return [json.dumps({"text": d.text, "source": d.source}, ensure_ascii=False) for d in long_enough]


def main() -> None:
    """Write the two texts, then train and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the downloaded packages")
    parser.add_argument("--output", type=Path, required=True, help="folder for model/, calib.jsonl and test.txt")
    add_settings(parser, Settings(minutes=15.0, tokens=7_000_000, batch=4, rate=3e-3))
    args = parser.parse_args()
    settings, folder = settings_of(args), args.output / "model"
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = documents(args.cache, names=SOURCES)
    training, heldout = split_texts(found, settings)
    lines = calibration_lines(found, tokenizer)
    (args.output / "calib.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (args.output / "test.txt").write_text(SEPARATOR.join(heldout) + "\n", encoding="utf-8")
    print(f"{len(training)} documents to train on, {len(lines)} to calibrate with, {len(heldout)} held out", flush=True)

    rows = pack(tokenizer, training, settings.length), pack(tokenizer, heldout, settings.length)
    saved = train_into(folder, new_model(tokenizer), rows, settings, balanced_loss)
    show_samples(saved, tokenizer, settings.seed)


if __name__ == "__main__":
    main()
