"""Train the small Llama model and the held-out text that ship with the package.

Quantization can only be shown to work on weights that were really trained: random weights have neither outliers nor
a perplexity worth preserving. This script builds such a model from the permissive text of `corpus.py`, on one CPU
core, small enough to be an asset. Usage:

    python tools/train_demo_model.py --cache CACHE --minutes 33 --compile
    python tools/train_demo_model.py --cache CACHE --minutes 5 --compile --resume --length 1024 --batch 4 --rate 6e-4

The second command teaches the finished model positions beyond the 512 of the first, which are cheaper to train on.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")

import torch
from corpus import documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from training import (
    EOS,
    PAD,
    SEPARATOR,
    Settings,
    add_settings,
    next_token_loss,
    pack,
    settings_of,
    show_samples,
    split_texts,
    train_into,
)
from transformers import LlamaConfig, LlamaForCausalLM

ASSETS = Path(__file__).resolve().parent.parent / "auto_round" / "assets"
VOCAB_SIZE = 2048


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer, so that any text, in any script, can be encoded without an unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, length: int) -> None:
    """Write the two files from which AutoTokenizer rebuilds a PreTrainedTokenizerFast."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """The architecture of the asset, freshly initialised."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return LlamaForCausalLM(config)


def parse_arguments() -> tuple[argparse.Namespace, Settings]:
    """Command line, and the settings it overrides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the downloaded packages")
    parser.add_argument("--output", type=Path, default=ASSETS, help="assets folder to write to")
    add_settings(parser, Settings())
    parser.add_argument("--resume", action="store_true", help="go on with the saved model and tokenizer")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step (needs a C++ compiler)")
    args = parser.parse_args()
    return args, settings_of(args)


def prepare(args: argparse.Namespace, training: list[str], heldout: list[str]) -> Tokenizer:
    """The tokenizer and the held-out file: written by a first run, left alone by a resumed one."""
    folder = args.output / "demo_model"
    if args.resume:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = train_tokenizer(training)
    save_tokenizer(tokenizer, folder, length=1024)
    (args.output / "heldout.txt").write_text(SEPARATOR.join(heldout) + "\n", encoding="utf-8")
    return tokenizer


def main() -> None:
    """Build the tokenizer, the held-out text and the model."""
    args, settings = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    folder = args.output / "demo_model"

    training, heldout = split_texts(documents(args.cache, training_only=True), settings)
    tokenizer = prepare(args, training, heldout)
    rows = pack(tokenizer, training, settings.length), pack(tokenizer, heldout, settings.length)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) if args.resume else new_model(tokenizer)
    loss_of = torch.compile(next_token_loss) if args.compile else next_token_loss
    saved = train_into(folder, model, rows, settings, loss_of)
    show_samples(saved, tokenizer, settings.seed)


if __name__ == "__main__":
    main()
