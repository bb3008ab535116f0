"""`auto-round export WORK`: writes the codes of an earlier run in another format, without tuning again."""

from __future__ import annotations

from pathlib import Path

from auto_round.cli.parser import Parser, UsageError, add_debug, add_trust

ABOUT = """Write an earlier run in another format: auto-round export WORK --format fake --output_dir OUT

WORK is the work folder of a run (its report names it), the folder of work folders beside an output, or a finished
output folder whose work folder is still there."""


def run(arguments: list[str]) -> int:
    parser = Parser("export", ABOUT, "work")
    parser.add_argument("--format", "--formats", default="auto_round", help="`auto-round list formats` shows them")
    parser.add_argument("--output_dir", help="the folder to write")
    parser.add_argument("--model", help="the original's folder, if it has moved since the run")
    add_trust(parser)
    add_debug(parser)
    options = parser.parse(arguments)
    if options.work is None or options.output_dir is None:
        raise UsageError("give the work folder and --output_dir, as in `auto-round export WORK --output_dir OUT`")
    work = find_work(Path(options.work))

    from auto_round.cli.summary import print_pairs
    from auto_round.compressors.again import export_work

    trusted = options.trust_remote_code
    folder = export_work(work, options.format, options.output_dir, model=options.model, trust_remote_code=trusted)
    print_pairs("Exported", [("format", options.format), ("files", str(folder))])
    return 0


def find_work(folder: Path) -> Path:
    """The work folder that a person means.

    Raises:
        UsageError: there is none, or more than one.
    """
    if (folder / "run.json").is_file():
        return folder
    report = folder / "report.json"
    if report.is_file():
        from auto_round.modeling.reading import read_json

        work = Path(str(read_json(report).get("work_folder") or ""))
        if (work / "run.json").is_file():
            return work
        raise UsageError(f"the work folder of {folder} is gone: run the quantization again with the new --format")
    found = sorted(path.parent for path in folder.glob("*/run.json"))
    if len(found) != 1:
        which = f"several runs: give one of {', '.join(map(str, found))}" if found else "no run"
        raise UsageError(f"{folder} holds {which}" if found else f"{folder} is no work folder: it has no run.json")
    return found[0]
