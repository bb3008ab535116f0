"""`auto-round doctor MODEL`: what a model type lacks, why, and what mends it; with `--scaffold`, the files to start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auto_round.cli.parser import Parser, UsageError, add_debug, add_trust

if TYPE_CHECKING:
    from auto_round.doctor.finding import Finding

ABOUT = """Examine a model type: auto-round doctor MODEL

MODEL is a model folder, a hub id or a config.json. No weights are needed: a tiny random clone of the configuration
goes through the whole contract - blocks, layers, replay, calibration, quantization, saving, reloading, outputs, names.
Each check passes, or says the symptom, its cause in this model, and the extension point that mends it.
Exits with 1 if a check fails.

auto-round doctor --scaffold MODEL writes the starting point: the handler, unfuser or key entry, and the test."""

STYLES = {"passed": "green", "warning": "yellow", "failed": "red", "not reached": "dim"}


def run(arguments: list[str]) -> int:
    parser = Parser("doctor", ABOUT, "model")
    parser.add_argument("--scheme", default="W4A16", help="what the clone is quantized to, in groups of 32")
    parser.add_argument("--json", metavar="FILE", help="write the findings to a file, too")
    parser.add_argument("--scaffold", action="store_true", help="write what mends the model, and its test")
    parser.add_argument("--output", metavar="DIR", help="with --scaffold: where (default: the current folder)")
    parser.add_argument("--force", action="store_true", help="with --scaffold: overwrite files that exist")
    add_trust(parser)
    add_debug(parser)
    options = parser.parse(arguments)
    if options.model is None:
        raise UsageError("give a model folder, a hub id or a config.json, as in `auto-round doctor MODEL`")
    if not options.scaffold and (options.output or options.force):
        raise UsageError("--output and --force belong to --scaffold")

    from auto_round.doctor.diagnose import as_plain, diagnose, passed
    from auto_round.schemes import parse_scheme

    parse_scheme(options.scheme)  # a misspelt one is no finding about the model
    findings = diagnose(options.model, options.scheme, options.trust_remote_code, _Printer(options.model))
    _print_remedies(findings)
    if options.json:
        text = json.dumps(as_plain(findings), indent=2, default=str)
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    if options.scaffold:
        _scaffold(findings, options)
    return 0 if passed(findings) else 1


class _Printer:
    """Prints each finding as soon as it is there."""

    def __init__(self, model: str):
        from rich.text import Text

        from auto_round.cli.summary import console

        self._console = console()
        self._console.print(Text(f"Examining a tiny random clone of {model}", style="bold"))

    def __call__(self, finding: Finding) -> None:
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 2))
        for width in (11, 17, None):
            line.add_column(width=width, overflow="fold")
        words = finding.symptom if finding.failed else finding.detail
        line.add_row(Text(finding.status, STYLES[finding.status]), Text(finding.check, "bold"), Text(words))
        self._console.print(line)


def _print_remedies(findings: list[Finding]) -> None:
    from auto_round.cli.summary import console, print_pairs

    troubled = [finding for finding in findings if finding.symptom]
    for finding in troubled:
        rows = [("symptom", finding.symptom), ("cause", finding.cause), ("remedy", finding.remedy)]
        print_pairs(f"{finding.check} ({finding.status})", rows)
    failed = sum(finding.failed for finding in findings)
    unreached = sum(finding.status == "not reached" for finding in findings)
    words = f"{len(findings) - failed - unreached} of {len(findings)} checks passed"
    words += f", {failed} failed, {unreached} not reached" if failed else ": this type needs no code of its own"
    console().print(words, markup=False)


def _scaffold(findings: list[Finding], options: Any) -> None:
    from auto_round.cli.summary import print_pairs
    from auto_round.doctor.scaffold import scaffold

    written = scaffold(findings, options.output or ".", options.force)
    rows = [("wrote", str(path)) for path in written.files]
    rows += [(f"step {number}", step) for number, step in enumerate(written.steps, 1)]
    print_pairs("Scaffold", rows)
