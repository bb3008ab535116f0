#!/usr/bin/env python
"""The frontier: what is left of a model after quantizing it, against processor seconds and memory.

Rows (number formats) × recipes × implementations × models × seeds, each quantized in a fresh process and measured by
another one with the code of quality.py. Results are JSON lines; what is there is not measured again. See README.md.

    python benchmarks/frontier.py --model small=DIR,calib.jsonl,test.txt --quantizer ours=PYTHON \\
        --quantizer auto-round=PYTHON --results frontier.jsonl
    python benchmarks/frontier.py --results frontier.jsonl --table --plot frontier.svg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from _frontier_report import figure, table
from _quantizers import FLOATS, RECIPES, integer_row
from quality import Quantizer, Record, keep_result, measure, read_results, workplace

KEY = ("model", "tag", "row", "recipe", "seed", "nsamples", "seqlen", "threads")
ROWS = ("W4g128", "W3g128", "W2g64", "W2g32", *FLOATS, "Q4_K_M", "Q3_K_M", "Q2_K_S")


@dataclass(frozen=True)
class Kind:
    """What an implementation can do: its package, its recipes, and the sort of rows it knows."""

    package: str
    recipes: tuple[str, ...]
    integers: bool
    others: tuple[str, ...] = ()

    def can(self, row: str, recipe: str) -> bool:
        """Whether a recipe of this implementation is measured for a row."""
        return recipe in self.recipes and (row in self.others or (self.integers and integer_row(row) is not None))


OURS = Kind("auto_round", tuple(RECIPES), True, ROWS[4:])
KINDS = {
    "ours": OURS,
    "auto-round": OURS,
    "gptqmodel": Kind("gptqmodel", ("gptq",), True),
    "llm-compressor": Kind("llmcompressor", ("gptq", "awq"), True),
    "llama.cpp": Kind("gguf", ("plain", "imatrix"), False, ROWS[6:]),
}


@dataclass(frozen=True)
class Subject:
    """A model that is quantized: its folder, the text to calibrate with and the text it is judged on."""

    name: str
    model: Path
    calib: Path
    test: Path

    @classmethod
    def parse(cls, value: str) -> Subject:
        """Of NAME=FOLDER,CALIBRATION,TEST."""
        name, _, paths = value.partition("=")
        found = [Path(path) for path in paths.split(",")]
        if not name or len(found) != 3:
            raise argparse.ArgumentTypeError(f"a model is NAME=FOLDER,CALIBRATION,TEST, not {value!r}")
        if absent := [str(path) for path in found if not path.exists()]:
            raise argparse.ArgumentTypeError(f"{name}: there is no {', '.join(absent)}")
        return cls(name, *found)


def quantizers(options: argparse.Namespace) -> dict[str, Quantizer]:
    """The implementations asked for, by tag."""
    paths = dict(item.split("=", 1) for item in options.path)
    found = {}
    for item in options.quantizer:
        tag, _, python = item.partition("=")
        if tag not in KINDS or not python:
            raise SystemExit(f"--quantizer {item}: it is TAG=INTERPRETER, and the tag one of {', '.join(KINDS)}")
        settings = {"ggml": str(options.ggml)} if tag == "llama.cpp" else {}
        found[tag] = Quantizer(python, paths.get(tag), KINDS[tag].package, settings)
    return found


def cases(options: argparse.Namespace, tags: list[str]) -> Iterator[tuple[Subject, Record]]:
    """All cases; implementations take turns within a row and recipe, so that both meet the same machine."""
    for seed in options.seeds:
        for recipe in options.recipes:
            for row in options.rows:
                for subject in options.model:
                    for tag in tags:
                        if KINDS[tag].can(row, recipe):
                            case = {"model": subject.name, "tag": tag, "row": row, "recipe": recipe, "seed": seed}
                            yield subject, case | {key: getattr(options, key) for key in KEY[5:]}


def drive(options: argparse.Namespace) -> int:
    """Measure what is not in the results yet; the number of failures."""
    results, work, run = workplace(options)
    chosen = quantizers(options)
    done = set() if options.force else set(read_results(results, KEY))
    failures = 0
    for subject, case in cases(options, list(chosen)):
        if tuple(case[key] for key in KEY) in done:
            continue
        texts = {"model": subject.model, "calib": subject.calib, "test": subject.test}
        settings = argparse.Namespace(**{**vars(options), **texts})
        record = {"run": run} | measure(case, chosen[case["tag"]], settings, work)
        failures += not record["ok"]
        keep_result(results, record)
    return failures


def names(value: str) -> list[str]:
    return [part.strip() for part in value.split(",")]


def parse_options() -> argparse.Namespace:
    """Read and check the command line."""
    every = dict.fromkeys(recipe for kind in KINDS.values() for recipe in kind.recipes)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Subject.parse, action="append", default=[], metavar="NAME=FOLDER,CALIBRATION,TEST"
    )
    parser.add_argument("--quantizer", action="append", default=[], metavar="TAG=INTERPRETER", help=", ".join(KINDS))
    parser.add_argument("--path", action="append", default=[], metavar="TAG=DIR", help="import path for one tag")
    parser.add_argument("--ggml", type=Path, help="llama.cpp's libggml-base, which the tag llama.cpp needs")
    parser.add_argument("--rows", type=names, default=list(ROWS), help=f"default: {', '.join(ROWS)}")
    parser.add_argument("--recipes", type=names, default=list(every), help=f"default: {', '.join(every)}")
    parser.add_argument("--seeds", type=lambda value: [int(part) for part in value.split(",")], default=[42, 43, 44])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--results", type=Path, default=Path("frontier.jsonl"))
    parser.add_argument("--work", type=Path, help="folder for outputs and logs (default: a temporary one)")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for one process")
    parser.add_argument("--keep", action="store_true", help="keep the saved models")
    parser.add_argument("--force", action="store_true", help="measure again what is already there")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the results (needs matplotlib)")
    parser.add_argument("--baseline", default="auto-round/default", help="TAG/RECIPE that ratios are taken to")
    options = parser.parse_args()
    options.report = options.table or options.plot is not None
    if not options.report and not (options.model and options.quantizer):
        parser.error("needed: --model and --quantizer, or --table or --plot of what is there")
    if not options.report and any(q.startswith("llama.cpp=") for q in options.quantizer) and not options.ggml:
        parser.error("llama.cpp needs --ggml LIBRARY; tools/clients.sh llamacpp makes one")
    return options


def main() -> int:
    """Entry point; the number of failures."""
    options = parse_options()
    if not options.report:
        return drive(options)
    asked = [
        record
        for record in read_results(options.results, KEY).values()
        if record["row"] in options.rows and record["recipe"] in options.recipes and record["seed"] in options.seeds
    ]
    asked.sort(key=lambda record: options.rows.index(record["row"]))
    if options.table:
        print(table(asked, options.baseline))
    if options.plot:
        figure(asked, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
