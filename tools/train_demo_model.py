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
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")

import torch
from corpus import Document, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

ASSETS = Path(__file__).resolve().parent.parent / "auto_round" / "assets"
EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE = 2048
SEPARATOR = "\n<|doc|>\n"
PROMPTS = ("The Government of the United States", "She was not at all surprised", "def read_file(path):\n")


@dataclass(frozen=True)
class Settings:
    """What determines the trained weights, apart from the corpus."""

    seed: int = 20
    tokens: int = 14_500_000
    minutes: float = 35.0
    batch: int = 8
    length: int = 512
    rate: float = 3e-3
    warmup: int = 100
    decay: float = 0.1
    clip: float = 1.0

    @property
    def steps(self) -> int:
        """Optimizer steps needed to see `tokens` tokens."""
        return self.tokens // (self.batch * self.length)


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


def pack(tokenizer: Tokenizer, texts: list[str], length: int) -> torch.Tensor:
    """Rows of `length` + 1 tokens cut from one stream of documents and eos; neighbouring rows share a token."""
    eos = tokenizer.token_to_id(EOS)
    stream: list[int] = []
    for start in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch(texts[start : start + 256]):
            stream.extend(encoding.ids)
            stream.append(eos)
    rows = (len(stream) - 1) // length
    flat = torch.tensor(stream[: rows * length + 1], dtype=torch.int64)
    return flat.unfold(0, length + 1, length)


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


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write a bfloat16 copy, leaving the float32 weights in training untouched."""
    config = LlamaConfig.from_dict(model.config.to_dict())
    config.dtype = torch.bfloat16
    copy = LlamaForCausalLM(config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, do_sample=True, temperature=0.8, top_k=50
    )
    copy.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # weights are written through a private temporary file


def next_token_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of every token but the first of each row."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Mean loss over packed rows."""
    model.eval()
    losses = [next_token_loss(model, part).item() * len(part) for part in rows.split(8)]
    model.train()
    return sum(losses) / len(rows)


def batches(rows: torch.Tensor, settings: Settings) -> Iterator[torch.Tensor]:
    """Endless shuffled batches, each epoch in a new seeded order."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - settings.batch + 1, settings.batch):
            yield rows[order[start : start + settings.batch]]


def new_optimizer(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices but not norm gains."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=True)


def rate_at(step: int, elapsed: float, settings: Settings) -> float:
    """Linear warm-up, then a cosine to a twentieth, driven by steps or by time, whichever is further along.

    Following the clock too means that a slow machine still ends on a finished schedule instead of a cut-off one.
    """
    if step < settings.warmup:
        return settings.rate * (step + 1) / settings.warmup
    done = min(1.0, max(step / settings.steps, elapsed / (60 * settings.minutes)))
    return settings.rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    model: LlamaForCausalLM,
    rows: torch.Tensor,
    settings: Settings,
    loss_of: Callable[[LlamaForCausalLM, torch.Tensor], torch.Tensor],
    report: Callable[[int, float, float], None],
) -> tuple[int, float]:
    """Run the optimizer until the tokens or the minutes are used up; returns steps taken and the mean recent loss."""
    optimizer = new_optimizer(model, settings)
    start, recent, step = time.monotonic(), [], 0
    for step, batch in enumerate(batches(rows, settings), 1):
        elapsed = time.monotonic() - start
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step - 1, elapsed, settings)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent[-99:], loss.item()]
        if step % 100 == 0:
            report(step, sum(recent) / len(recent), elapsed)
        if step >= settings.steps or elapsed >= 60 * settings.minutes:
            break
    return step, sum(recent) / len(recent)


def split_texts(found: list[Document], settings: Settings) -> tuple[list[str], list[str]]:
    """Training texts in a seeded order, and the held-out ones mixed by digest."""
    training = [d.text for d in found if d.split == "train"]
    random.Random(settings.seed).shuffle(training)
    heldout = sorted((d for d in found if d.split == "heldout"), key=lambda d: d.digest)
    return training, [d.text for d in heldout]


@torch.no_grad()
def show_samples(model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int) -> None:
    """Print continuations, which tell at a glance whether the model has learned anything."""
    torch.manual_seed(seed)
    model.eval()
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = model.generate(ids, max_new_tokens=80, do_sample=True, temperature=0.7, top_k=40)
        print("--- sample:", tokenizer.decode(out[0].tolist()), flush=True)


def parse_arguments() -> tuple[argparse.Namespace, Settings]:
    """Command line, and the settings it overrides."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the downloaded packages")
    parser.add_argument("--output", type=Path, default=ASSETS, help="assets folder to write to")
    parser.add_argument("--tokens", type=int, default=defaults.tokens)
    parser.add_argument("--minutes", type=float, default=defaults.minutes)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--length", type=int, default=defaults.length, help="tokens in a row")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="rows in a batch")
    parser.add_argument("--rate", type=float, default=defaults.rate, help="highest learning rate")
    parser.add_argument("--resume", action="store_true", help="go on with the saved model and tokenizer")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step (needs a C++ compiler)")
    args = parser.parse_args()
    names = ("seed", "tokens", "minutes", "length", "batch", "rate")
    return args, Settings(**{name: getattr(args, name) for name in names})


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
    rows, held = pack(tokenizer, training, settings.length), pack(tokenizer, heldout, settings.length)
    print(
        f"{len(training)} documents, {rows[:, 1:].numel()} training tokens, {held[:, 1:].numel()} held out", flush=True
    )

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) if args.resume else new_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {settings}", flush=True)

    def report(step: int, loss: float, elapsed: float) -> None:
        """Log progress, and keep a usable model on disk in case the run is interrupted."""
        validation = f" heldout {evaluate(model, held[:32]):.4f}" if step % 500 == 0 else ""
        print(f"step {step}/{settings.steps} loss {loss:.4f}{validation} {elapsed:.0f}s", flush=True)
        if step % 500 == 0:
            save_model(model, folder)

    loss_of = torch.compile(next_token_loss) if args.compile else next_token_loss
    steps, loss = train(model, rows, settings, loss_of, report)
    save_model(model, folder)
    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    final = evaluate(saved, held)
    print(f"steps {steps}, tokens {steps * settings.batch * settings.length}, train loss {loss:.4f}, "
          f"held-out loss {final:.4f}, held-out perplexity {math.exp(final):.3f}", flush=True)  # fmt: skip
    show_samples(saved, tokenizer, settings.seed)


if __name__ == "__main__":
    main()
