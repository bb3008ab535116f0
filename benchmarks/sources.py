"""Which calibration text is best for a model: quantizes it once per source and seed, measured on held-out text.

One line of JSON per row; rows that are in the file already are skipped, so a stopped run goes on. Text that the model
writes itself is kept beside the results and shared by all rows of a seed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from quality import compare, load_original, test_windows

from auto_round import AutoRound


def measure(options: argparse.Namespace, source: str, seed: int) -> dict[str, Any]:
    """Quantize with one source of text; CPU seconds are of the data and of the rest, KL is from the original."""
    began = time.process_time()
    run = AutoRound(
        str(options.model),
        scheme=options.scheme,
        group_size=options.group_size,
        iters=options.iters,
        nsamples=options.nsamples,
        seqlen=options.seqlen,
        dataset=source,
        seed=seed,
        show_progress=False,
    )
    run.load_data(options.out.with_suffix(".texts"))
    read = time.process_time()
    model, _ = run.quantize()
    done = time.process_time()
    found = compare(model, load_original(options.model), test_windows(options.model, options.test))
    seconds = {"data_s": round(read - began, 1), "tune_s": round(done - read, 1)}
    return {"source": source, "seed": seed, "documents": run.data.documents, **seconds, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True, help="held-out text, documents separated by <|doc|>")
    parser.add_argument("--out", type=Path, required=True, help="results, one JSON object a line")
    parser.add_argument("--sources", nargs="+", default=["builtin", "self", "self:0.5,builtin:0.5"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--scheme", default="W2A16")
    for name, value in (("group_size", 32), ("iters", 50), ("nsamples", 128), ("seqlen", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {(one["source"], one["seed"]) for one in map(json.loads, lines)}
    for seed in options.seeds:
        for source in options.sources:
            if (source, seed) not in done:
                row = json.dumps(measure(options, source, seed))
                print(row, flush=True)
                with options.out.open("a") as file:
                    file.write(row + "\n")


if __name__ == "__main__":
    main()
