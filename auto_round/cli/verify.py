"""`auto-round verify DIR`: the checks of a run once more, on a finished folder."""

from __future__ import annotations

from pathlib import Path

from auto_round.cli.parser import Parser, UsageError, add_debug, add_trust

ABOUT = """Check a quantized folder: auto-round verify DIR --against ORIGINAL

Opens every file, compares it with what its report recorded and, beside the original, compares tensors and outputs.
Exits with 1 if a check fails."""


def run(arguments: list[str]) -> int:
    parser = Parser("verify", ABOUT, "dir")
    parser.add_argument("--against", metavar="ORIGINAL", help="folder of the original model")
    add_trust(parser)
    add_debug(parser)
    options = parser.parse(arguments)
    if options.dir is None:
        raise UsageError("give the folder to check, as in `auto-round verify DIR`")
    for folder in (options.dir, options.against):
        if folder is not None and not Path(folder).is_dir():
            raise UsageError(f"the folder {folder} does not exist: check the path")

    from auto_round.cli.summary import print_pairs, print_table, silence_loading
    from auto_round.report import figure
    from auto_round.verify.finished import verify_artifact

    silence_loading()
    result = verify_artifact(options.dir, options.against, options.trust_remote_code)
    rows = [(check.name, "passed" if check.passed else "FAILED", check.detail) for check in result.checks]
    print_table(f"Checks of {options.dir}", ("check", "result", "detail"), rows)
    if result.kl is not None:
        measured = f"KL {figure(result.kl)} nats per token, top-1 agreement {result.top1:.1%}"
        print_pairs(f"Against {options.against}", [("outputs", measured)])
    return 0 if result.passed else 1
