"""Build the calibration text that ships with the package.

Calibration decides which activations a quantizer sees, so the text should resemble what models are used for: prose,
documentation, code, conversation, mathematics and many scripts. Everything comes from the permissive sources of
`corpus.py` (from documents that are neither in the demo model's training nor in its held-out part), from
`worked_math.py`, and from the hand-written files in `calibration_sources`. Usage:

    python tools/build_calibration.py --cache CACHE
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from corpus import SOURCES, Deduplicator, Document, documents
from worked_math import worksheets

TOOLS = Path(__file__).resolve().parent
OUTPUT = TOOLS.parent / "auto_round" / "assets" / "calibration.jsonl"
WORKSHEETS, SEED = 54, 7
SHORTEST = 1200
LONGEST_FILE = 2_000_000

# Bytes of text taken from every (source, kind); a trailing * gives each language of the source its own budget.
BUDGETS: dict[str, int] = {
    "sotu/prose": 110_000,
    "austen/prose": 130_000,
    "moby-dick/prose": 70_000,
    "python-docs/docs": 110_000,
    "sqlite-docs/docs": 70_000,
    "django/docs": 70_000,
    "django/code": 130_000,
    "python-stdlib/code": 150_000,
    "fastapi-docs/lang:*": 36_000,
    "udhr/lang:*": 17_000,
}


def budget_of(document: Document) -> int:
    """How many bytes the document's group may contribute."""
    kind = "lang:*" if document.kind.startswith("lang:") else document.kind
    return BUDGETS.get(f"{document.source}/{kind}", 0)


def select(found: Iterable[Document], trained_on: set[str]) -> Iterator[Document]:
    """Fill each group's budget in digest order, which is random but always the same."""
    spent: Counter[tuple[str, str]] = Counter()
    for document in sorted(found, key=lambda d: d.digest):
        if document.source in trained_on and document.split != "calibration":
            continue
        size = len(document.text.encode())
        group = (document.source, document.kind)
        if size >= SHORTEST and spent[group] + size <= budget_of(document):
            spent[group] += size
            yield document


def handwritten(folder: Path) -> Iterator[Document]:
    """The documents of the hand-written files, each introduced by a line `<|doc KIND|>`."""
    for path in sorted(folder.glob("*.txt")):
        _, *parts = re.split(r"(?m)^<\|doc ([\w:]+)\|>\n", path.read_text(encoding="utf-8"))
        for kind, text in zip(parts[::2], parts[1::2], strict=True):
            yield Document(text.strip(), kind, f"handwritten/{path.stem}")


def build(cache: Path) -> list[Document]:
    """All calibration documents, without repetitions, mixed by digest."""
    trained_on = {source.name for source in SOURCES if source.train}
    chosen = [
        *handwritten(TOOLS / "calibration_sources"),
        *(Document(text, "math", "worked_math") for text in worksheets(WORKSHEETS, SEED)),
        *select(documents(cache), trained_on),
    ]
    unique = Deduplicator()
    return sorted((d for d in chosen if unique.is_new(d.text)), key=lambda d: d.digest)


def as_line(document: Document) -> str:
    """One JSON line; documentation counts as prose."""
    kind = "prose" if document.kind == "docs" else document.kind
    return json.dumps({"text": document.text, "kind": kind, "source": document.source}, ensure_ascii=False)


def main() -> None:
    """Write the file and print what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the downloaded packages")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    chosen = build(args.cache)
    data = "".join(as_line(document) + "\n" for document in chosen).encode()
    if len(data) >= LONGEST_FILE:
        raise ValueError(f"the calibration file would take {len(data)} bytes")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(data)
    totals: Counter[str] = Counter()
    for document in chosen:
        totals[f"{document.source} {document.kind}"] += len(document.text.encode())
    for group, size in sorted(totals.items()):
        print(f"{size:8d}  {group}")
    print(f"{len(data):8d}  bytes in {len(chosen)} documents")


if __name__ == "__main__":
    main()
