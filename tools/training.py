"""The training loop of the small models that this project measures with.

Models of different families are trained on the text of `corpus.py`; what they share is here: rows of tokens cut from
documents, AdamW on a schedule that also follows processor time, a bfloat16 copy on disk, a look at what was learned.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from corpus import Document
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

EOS, PAD = "<|endoftext|>", "<|pad|>"
SEPARATOR = "\n<|doc|>\n"
PROMPTS = ("The Government of the United States", "She was not at all surprised", "def read_file(path):\n")

LossOf = Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]


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


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a bfloat16 copy, leaving the float32 weights in training untouched."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = torch.bfloat16
    copy = type(model)(config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, do_sample=True, temperature=0.8, top_k=50
    )
    copy.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # weights are written through a private temporary file


def outputs_of(model: PreTrainedModel, rows: torch.Tensor, **asked: bool) -> ModelOutput:
    """What the model makes of every token but the last of each row, its products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=rows[:, :-1], use_cache=False, **asked)


def prediction_loss(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of every token but the first of each row."""
    return cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def next_token_loss(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """The loss of a model that learns nothing but to predict the next token."""
    return prediction_loss(outputs_of(model, rows).logits, rows)


@torch.no_grad()
def evaluate(model: PreTrainedModel, rows: torch.Tensor) -> float:
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


def new_optimizer(model: PreTrainedModel, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices but not norm gains."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=True)


def rate_at(step: int, elapsed: float, settings: Settings) -> float:
    """Linear warm-up, then a cosine to a twentieth, driven by steps or by time, whichever is further along.

    Following time too means that a slow machine still ends on a finished schedule instead of a cut-off one. It is the
    process's own time, so that what else a shared machine does costs patience and not quality.
    """
    if step < settings.warmup:
        return settings.rate * (step + 1) / settings.warmup
    done = min(1.0, max(step / settings.steps, elapsed / (60 * settings.minutes)))
    return settings.rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    model: PreTrainedModel,
    rows: torch.Tensor,
    settings: Settings,
    loss_of: LossOf,
    report: Callable[[int, float, float], None],
) -> tuple[int, float]:
    """Run the optimizer until the tokens or the minutes are used up; returns steps taken and the mean recent loss."""
    optimizer = new_optimizer(model, settings)
    start, recent, step = time.process_time(), [], 0
    for step, batch in enumerate(batches(rows, settings), 1):
        elapsed = time.process_time() - start
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
def show_samples(model: PreTrainedModel, tokenizer: Tokenizer, seed: int) -> None:
    """Print continuations, which tell at a glance whether the model has learned anything."""
    torch.manual_seed(seed)
    model.eval()
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = model.generate(ids, max_new_tokens=80, do_sample=True, temperature=0.7, top_k=40)
        print("--- sample:", tokenizer.decode(out[0].tolist()), flush=True)


def train_into(
    folder: Path,
    model: PreTrainedModel,
    rows: tuple[torch.Tensor, torch.Tensor],
    settings: Settings,
    loss_of: LossOf,
) -> PreTrainedModel:
    """Train on the first of `rows`, judge on the second (held out) and save; the model as it is read from `folder`."""
    training, held = rows
    sizes = f"{training[:, 1:].numel()} training tokens, {held[:, 1:].numel()} held out"
    print(f"{sizes}; {sum(p.numel() for p in model.parameters())} parameters, {settings}", flush=True)

    def report(step: int, loss: float, elapsed: float) -> None:
        """Log progress, and keep a usable model on disk in case the run is interrupted."""
        validation = f" heldout {evaluate(model, held[:32]):.4f}" if step % 500 == 0 else ""
        print(f"step {step}/{settings.steps} loss {loss:.4f}{validation} {elapsed:.0f}s", flush=True)
        if step % 500 == 0:
            save_model(model, folder)

    steps, loss = train(model, training, settings, loss_of, report)
    save_model(model, folder)
    saved = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    final = evaluate(saved, held)
    print(f"steps {steps}, tokens {steps * settings.batch * settings.length}, train loss {loss:.4f}, "
          f"held-out loss {final:.4f}, held-out perplexity {math.exp(final):.3f}", flush=True)  # fmt: skip
    return saved


def add_settings(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    """An option for every setting that a command may change."""
    notes = {
        "minutes": "of processor time",
        "length": "tokens in a row",
        "batch": "rows in a batch",
        "rate": "highest learning rate",
    }
    for name in ("seed", "tokens", "minutes", "length", "batch", "rate"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=type(value), default=value, help=notes.get(name))


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the options of `add_settings` name."""
    return Settings(
        **{field.name: getattr(args, field.name) for field in fields(Settings) if hasattr(args, field.name)}
    )
