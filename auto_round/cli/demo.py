"""`auto-round demo`: what quantizing costs and what tuning gives back, on a small model that ships with the package.

Everything goes the way that a user's model goes: quantize and save, load with Transformers, measure on text that the
calibration has not seen. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.cli.parser import Parser, add_debug, whole_number
from auto_round.logger import logger
from auto_round.settings import RECIPES

ABOUT = """Quantize the model shipped with the package to 4 and 2 bits, by plain and by tuned rounding, load the results
with Transformers and measure them. Takes a few minutes on two cores and needs no network."""

DEMO_MODEL = Path(__file__).resolve().parent.parent / "assets" / "demo_model"
# (row, folder, arguments): the same scheme by plain and by tuned rounding.
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("4 bits, rounded", "w4-rounded", {"scheme": "W4A16G64", **RECIPES["rtn"]}),
    ("4 bits, tuned", "w4-tuned", {"scheme": "W4A16G64"}),
    ("2 bits, rounded", "w2-rounded", {"scheme": "W2A16G32", **RECIPES["rtn"]}),
    ("2 bits, tuned", "w2-tuned", {"scheme": "W2A16G32"}),
)
WINDOWS, WINDOW = 48, 256  # held-out text on which perplexity and divergence are measured
PROMPT = "The old man looked at the sea and"
NEW_TOKENS = 24


@dataclass
class Row:
    """One line of the table."""

    name: str
    perplexity: float
    text: str
    weights: int
    kl: float | None = None
    top1: float | None = None
    seconds: float | None = None
    folder: str = ""


def run(arguments: list[str]) -> int:
    options = _parse(arguments)

    from transformers import AutoModelForCausalLM  # noqa: F401 - so that the memory of importing it is known

    from auto_round.cli.summary import console, print_table, silence_loading
    from auto_round.utils.device import peak_memory_mb

    silence_loading()
    if not options.debug:
        logger.setLevel(logging.WARNING)  # one line a row is enough here
    began, imported = time.monotonic(), peak_memory_mb()
    with _one_thread():
        rows = measure(Path(options.output_dir), options)
    names = ("model", "perplexity", "KL divergence", "same top token", "weights", "seconds to quantize")
    print_table("Demo", names, map(_cells, rows), right=range(1, len(names)))
    print_table(f'What they write after "{PROMPT}"', ("model", "text"), ((row.name, row.text) for row in rows))
    out = console()
    out.print(f"{WINDOWS} windows of {WINDOW} held-out tokens; KL divergence in nats per token, from the original.")
    took, peak = time.monotonic() - began, peak_memory_mb()
    out.print(f"{took:.0f} seconds in all; peak memory {peak:.0f} MiB, of which {imported:.0f} MiB after importing.")
    out.print("Every folder was checked after it was written, and holds a report.html:")
    for row in rows[1:]:
        out.print(f"  {row.folder}", markup=False, soft_wrap=True)
    return _verdict(rows)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Products of matrices this small gain little from a second thread, and lose much where cores are shared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _parse(arguments: list[str]) -> Any:
    parser = Parser("demo", ABOUT)
    parser.add_argument("--output_dir", metavar="DIR", default="./tmp_autoround/demo", help="./tmp_autoround/demo")
    parser.add_argument("--iters", type=whole_number, metavar="N", default=100, help="tuning steps per block (100)")
    parser.add_argument("--nsamples", type=whole_number, metavar="N", default=64, help="calibration samples (64)")
    parser.add_argument("--seqlen", type=whole_number, metavar="N", default=256, help="tokens per sample (256)")
    parser.add_argument("--batch_size", type=whole_number, metavar="N", default=4, help="samples per step (4)")
    parser.add_argument("--model", metavar="DIR", default=str(DEMO_MODEL), help="another small model")
    add_debug(parser)
    return parser.parse(arguments)


def measure(output: Path, options: Any) -> list[Row]:
    """Quantize, save, load and measure every row, the original first."""
    from auto_round.eval.divergence import divergence
    from auto_round.eval.perplexity import perplexity, read_windows

    original, tokenizer = _load(options.model)
    windows = read_windows(tokenizer, None, WINDOW, WINDOWS)
    weights = sum(p.numel() * p.element_size() for p in original.parameters())
    rows = [Row("original", perplexity(original, windows), _write(original, tokenizer), weights)]
    for name, folder, settings in ROWS:
        print(f"quantizing: {name} …", file=sys.stderr, flush=True)
        took, report = _quantize(options, output / folder, settings)
        model, _ = _load(report["folder"])
        distance = divergence(model, original, windows)
        rows.append(
            Row(
                name,
                perplexity(model, windows),
                _write(model, tokenizer),
                report["sizes"]["output_bytes"],
                distance.kl,
                distance.top1,
                took,
                report["folder"],
            )
        )
    return rows


def _quantize(options: Any, output: Path, settings: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """(seconds, report) of one run; the checks raise if what was written is not what was quantized."""
    from auto_round.autoround import AutoRound

    # A work folder of an earlier demo would be continued, and the time shown would be that of reading it.
    for work in output.glob(f"{Path(options.model).resolve().name}-*.work"):
        shutil.rmtree(work)
    began = time.monotonic()
    sizes = {name: getattr(options, name) for name in ("iters", "nsamples", "seqlen", "batch_size")}
    compressor = AutoRound(options.model, device_map="cpu", **{**sizes, **settings})
    compressor.quantize_and_save(output)
    return time.monotonic() - began, compressor.report


def _load(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _write(model: Any, tokenizer: Any) -> str:
    """A few words of the model's own, on one line."""
    from auto_round.utils import model_infer

    text = model_infer(model, tokenizer, PROMPT, NEW_TOKENS)
    return " ".join(text.removeprefix(PROMPT).split())


def _cells(row: Row) -> tuple[str, ...]:
    from auto_round.report import size

    if row.kl is None or row.top1 is None or row.seconds is None:
        return row.name, f"{row.perplexity:.3f}", "", "", size(row.weights), ""
    return (
        row.name,
        f"{row.perplexity:.3f}",
        f"{row.kl:.4f}",
        f"{row.top1:.1%}",
        size(row.weights),
        f"{row.seconds:.1f}",
    )


def _verdict(rows: list[Row]) -> int:
    """0 if tuning at 2 bits is closer to the original than rounding, as it has to be."""
    from auto_round.cli.summary import console

    rounded, tuned = rows[-2], rows[-1]
    if not (tuned.kl < rounded.kl and tuned.perplexity < rounded.perplexity):
        console().print("auto-round: at 2 bits the tuned model is no better than the rounded one; something is wrong")
        return 1
    return 0
