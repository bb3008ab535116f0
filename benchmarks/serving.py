"""Tokens per second of a W4A16 artifact on a CPU, each backend against the bfloat16 model it was made from.

All models are loaded in one process and take turns, so that neighbours on the machine disturb them alike; the best of
the rounds counts, and what counts most is the ratio to bfloat16. The model is a random Llama, written to a temporary
folder and rounded to nearest: its size matters here, not what it says.

    python benchmarks/serving.py [--threads 1,2] [--backends auto,torch,torch_int4] [--rounds 5] [--model DIR]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoRoundConfig, LlamaConfig

from auto_round import AutoRound

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
DENSE = "bfloat16"


@dataclass
class Timing:
    """Least seconds of a measured call, of the processor (all threads together) and on the clock."""

    cpu: float = float("inf")
    wall: float = float("inf")

    def take(self, call: Callable[[], Any]) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        call()
        self.cpu, self.wall = min(self.cpu, time.process_time() - cpu), min(self.wall, time.perf_counter() - wall)


@dataclass
class Measured:
    """A model under test. prompts: tokens of a prompt → timing of reading it."""

    model: Any
    decode: Timing = field(default_factory=Timing)
    prompts: dict[int, Timing] = field(default_factory=dict)


def random_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def quantize(model: Path, folder: Path) -> Path:
    """A W4A16 artifact by plain rounding."""
    run = AutoRound(str(model), scheme="W4A16", iters=0, disable_opt_rtn=True, device_map="cpu", show_progress=False)
    return Path(run.quantize_and_save(folder)[1])


def load(folder: Path, backend: str | None = None) -> Any:
    wanted = {} if backend is None else {"quantization_config": AutoRoundConfig(backend=backend)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **wanted).eval()


@torch.no_grad()
def read_prompt(model: Any, tokens: int) -> Any:
    """The cache after a prompt; logits of its last token only, as generation computes them."""
    return model(torch.arange(tokens)[None] % SIZES["vocab_size"], use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def write_tokens(model: Any, past: Any, tokens: int) -> None:
    for step in range(tokens):
        model(torch.tensor([[step]]), past_key_values=past, use_cache=True)


def measure(models: dict[str, Any], options: argparse.Namespace) -> dict[str, Measured]:
    """Rounds in which every model takes its turn; the first warms up and does not count."""
    found = {name: Measured(model) for name, model in models.items()}
    for number in range(options.rounds + 1):
        for entry in found.values():
            past = read_prompt(entry.model, 64)
            decode, prompts = Timing(), {tokens: Timing() for tokens in options.prompts}
            decode.take(lambda entry=entry, past=past: write_tokens(entry.model, past, options.tokens))
            for tokens, timing in prompts.items():
                timing.take(lambda entry=entry, tokens=tokens: read_prompt(entry.model, tokens))
            if number:
                entry.decode = _best(entry.decode, decode)
                entry.prompts = {n: _best(entry.prompts.get(n, Timing()), timing) for n, timing in prompts.items()}
    return found


def _best(one: Timing, two: Timing) -> Timing:
    return Timing(min(one.cpu, two.cpu), min(one.wall, two.wall))


def rows(found: dict[str, Measured], options: argparse.Namespace, threads: int) -> list[str]:
    """Markdown: tokens per second of the clock and of the processor, and the ratios of both to bfloat16."""
    lines = []
    for name, entry in found.items():
        figures = [(options.tokens, entry.decode, found[DENSE].decode)]
        figures += [(tokens, entry.prompts[tokens], found[DENSE].prompts[tokens]) for tokens in options.prompts]
        cells = [
            f"{count / one.wall:.0f} / {count / one.cpu:.0f} ({base.wall / one.wall:.2f} / {base.cpu / one.cpu:.2f})"
            for count, one, base in figures
        ]
        lines.append(f"| {threads} | {name} | {' | '.join(cells)} |")
    return lines


def parse_options() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a bfloat16 model (default: a random Llama)")
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--backends", default="auto,torch,torch_int4,auto_round_kernel")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="tokens written one by one in a round")
    parser.add_argument("--prompts", type=numbers, default=[128, 512], help="lengths of the prompts read")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="serving-") as name:
        dense = options.model or random_llama(Path(name) / "model")
        artifact = quantize(dense, Path(name) / "out")
        models = {DENSE: load(dense)}
        for backend in options.backends.split(","):
            if backend == "auto_round_kernel" and importlib.util.find_spec(backend) is None:
                continue  # optional; the table simply has no such row
            models[backend] = load(artifact, backend)
    prompts = [f"prefill {tokens}" for tokens in options.prompts]
    print("Tokens per second of the clock / of the processor (ratios to bfloat16 in brackets):\n")
    print(f"| threads | backend | decode | {' | '.join(prompts)} |\n|{'---|' * (3 + len(prompts))}")
    for threads in options.threads:
        torch.set_num_threads(threads)
        print("\n".join(rows(measure(models, options), options, threads)), flush=True)


if __name__ == "__main__":
    main()
