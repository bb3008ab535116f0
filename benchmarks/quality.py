#!/usr/bin/env python
"""Quality and cost of weight-only quantization, one implementation against another.

Every combination of row (width and group size), recipe, seed and interpreter is quantized in a fresh process that does
nothing else, and the folder it saves is then measured by a second process that shares no code with any quantizer: it
decodes the packed integers itself, puts them into an fp32 copy of the original model and compares the two on held-out
text. See README.md next to this file.

This file is run by the interpreters under test too, so the module level needs the standard library only. The driving
process must stay small as well: on Linux a child starts out with its parent's peak resident set.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _quantizers import QUANTIZERS, RECIPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

Record = dict[str, Any]

ROWS = "W4g128,W4g32,W3g128,W2g64,W2g32"
KEY = ("tag", "row", "recipe", "seed", "nsamples", "seqlen", "threads")

EVAL_SEQLEN = 512
EVAL_WINDOWS = 120
KL_WINDOWS = 48
EVAL_BATCH = 4
DOCUMENT_BREAK = re.compile(r"\n?\n<\|doc\|>\n\n?")


# ---------------------------------------------------------------------------------------------------------------------
# Quantizing: runs in the interpreter under test
# ---------------------------------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """User and system seconds of this process and of the children it has waited for."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_rss_mib(who: int = resource.RUSAGE_SELF) -> float:
    """Peak resident set in MiB (``ru_maxrss`` counts KiB on Linux, bytes on macOS)."""
    return resource.getrusage(who).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def quantize_worker(job: Record) -> None:
    """Quantize and save once, and write what it cost to ``job["report"]``."""
    started = time.perf_counter()
    torch = importlib.import_module("torch")
    torch.set_num_threads(job["threads"])
    importlib.import_module("transformers")
    report: Record = {"import_rss_mb": peak_rss_mib()}
    package = importlib.import_module(job["package"])
    report["import_s"] = time.perf_counter() - started
    report["version"] = str(getattr(package, "__version__", "unknown"))
    report["torch"] = str(torch.__version__)
    report["import_cpu_s"] = cpu_seconds()
    started = time.perf_counter()
    QUANTIZERS[job["package"]](job)
    report["wall_s"] = time.perf_counter() - started
    report["peak_rss_mb"] = peak_rss_mib()
    report["child_peak_rss_mb"] = peak_rss_mib(resource.RUSAGE_CHILDREN)
    Path(job["report"]).write_text(json.dumps(report), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: runs in the calling interpreter, in a process of its own
# ---------------------------------------------------------------------------------------------------------------------


def test_windows(model: Path, text: Path) -> torch.Tensor:
    """Windows of token ids, evenly spaced over the text; every document is closed by the end-of-text token."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for document in DOCUMENT_BREAK.split(text.read_text(encoding="utf-8")):
        ids += tokenizer(document, add_special_tokens=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    total = len(ids) // EVAL_SEQLEN
    count = min(EVAL_WINDOWS, total)
    starts = [index * total // count * EVAL_SEQLEN for index in range(count)]
    return torch.tensor([ids[start : start + EVAL_SEQLEN] for start in starts])


def log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """fp32 log-probabilities of each next token, shape [batch, length - 1, vocabulary]."""
    import torch

    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].float(), dim=-1)


def compare(model: torch.nn.Module, reference: torch.nn.Module, windows: torch.Tensor) -> Record:
    """Perplexity on all windows; KL(reference || model) and top-1 agreement on evenly strided ones."""
    import torch

    stride = max(1, len(windows) // KL_WINDOWS)
    compared = set(range(0, len(windows), stride)[:KL_WINDOWS])
    nll = divergence = 0.0
    agreeing = 0
    for start in range(0, len(windows), EVAL_BATCH):
        batch = windows[start : start + EVAL_BATCH]
        found = log_probabilities(model, batch)
        nll -= found.gather(-1, batch[:, 1:, None]).sum(dtype=torch.float64).item()
        chosen = [index for index in range(len(batch)) if start + index in compared]
        if not chosen:
            continue
        expected, found = log_probabilities(reference, batch[chosen]), found[chosen]
        divergence += (expected.exp() * (expected - found)).sum(dtype=torch.float64).item()
        agreeing += int((expected.argmax(-1) == found.argmax(-1)).sum())
    tokens = len(windows) * (EVAL_SEQLEN - 1)
    kl_tokens = len(compared) * (EVAL_SEQLEN - 1)
    return {
        "ppl": math.exp(nll / tokens),
        "kl": divergence / kl_tokens,
        "top1": agreeing / kl_tokens,
        "ppl_tokens": tokens,
        "kl_tokens": kl_tokens,
    }


def evaluate_worker(job: Record) -> None:
    """Measure the folder ``job["output"]`` and write the figures to ``job["report"]``."""
    import torch

    torch.set_num_threads(job["threads"])
    started = time.perf_counter()
    original, folder = Path(job["model"]), Path(job["output"])
    from _checkpoints import load_decoded, load_original

    windows = test_windows(original, Path(job["test"]))
    report = compare(load_decoded(folder, original), load_original(original), windows)
    report["eval_s"] = time.perf_counter() - started
    Path(job["report"]).write_text(json.dumps(report), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Driving
# ---------------------------------------------------------------------------------------------------------------------


def child_environment(threads: int, path: str | None) -> dict[str, str]:
    """Environment of a measured process: fixed thread counts, no network, no import path but the one asked for."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE")
    env.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if path is not None:
        env["PYTHONPATH"] = path
    return env


def run_process(command: list[str], env: dict[str, str], log: Path, cwd: Path, timeout: float) -> Record:
    """Run a command into a log file; its exit status and what it and the children it waited for have cost."""
    started = time.perf_counter()
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=env, cwd=cwd, start_new_session=True)
        pid, timed_out = 0, False
        try:
            while not pid:
                time.sleep(0.1)
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if not pid and not timed_out and time.perf_counter() - started > timeout:
                    timed_out = True
                    os.killpg(process.pid, signal.SIGKILL)
        except BaseException:  # an interrupted driver leaves nothing running
            os.killpg(process.pid, signal.SIGKILL)
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "status": "timeout" if timed_out else process.returncode,
        "process_s": time.perf_counter() - started,
        "tree_cpu_s": usage.ru_utime + usage.ru_stime,
    }


def run_worker(kind: str, python: str, job: Record, env: dict[str, str], work: Path, timeout: float) -> Record:
    """Run one of this file's workers in a fresh process; what it reported, or an ``error``."""
    report = Path(job["report"])
    report.unlink(missing_ok=True)
    command = [python, str(Path(__file__).resolve()), f"--{kind}-worker", json.dumps(job)]
    cost = run_process(command, env, Path(job["log"]), work, timeout)
    if cost["status"] != 0 or not report.exists():
        tail = Path(job["log"]).read_text(encoding="utf-8", errors="replace")[-800:]
        return {"error": f"{kind}: exit {cost['status']}", "tail": tail}
    found: Record = json.loads(report.read_text(encoding="utf-8"))
    if kind == "quantize":
        found |= {"process_s": cost["process_s"], "tree_cpu_s": cost["tree_cpu_s"]}
        found["cpu_s"] = cost["tree_cpu_s"] - found["import_cpu_s"]  # children that ended late are in the tree only
    return found


@dataclass(frozen=True)
class Quantizer:
    """An implementation: its interpreter, an import path of its own, the package, and what only it has to be told."""

    python: str
    path: str | None = None
    package: str = "auto_round"
    settings: Record = field(default_factory=dict)


def saved_folder(output: Path) -> Path:
    """The folder at or below ``output`` that holds a model (the API may append a name of its own)."""
    found = [*output.rglob("*.gguf"), *output.rglob("config.json")]
    if not found:
        raise FileNotFoundError(f"nothing saved below {output}")
    return min(found, key=lambda path: len(path.parts)).parent


def measure(case: Record, quantizer: Quantizer, options: argparse.Namespace, work: Path) -> Record:
    """Quantize and evaluate one case; its record for the results file."""
    name = "_".join(str(case[key]) for key in ("tag", "row", "recipe", "seed"))
    output = work / "out" / name
    shutil.rmtree(output, ignore_errors=True)
    job = {
        **{key: case[key] for key in ("row", "recipe", "seed", "nsamples", "seqlen", "threads")},
        "package": quantizer.package,
        **quantizer.settings,
        "model": str(Path(options.model).resolve()),
        "calib": str(Path(options.calib).resolve()),
        "output": str(output),
        "report": str(work / "report.json"),
        "log": str(work / "logs" / f"{name}.log"),
    }
    Path(job["log"]).unlink(missing_ok=True)
    record = {**case, "ok": False, "when": time.strftime("%Y-%m-%dT%H:%M:%S"), "load1": os.getloadavg()[0]}
    env = child_environment(options.threads, quantizer.path)
    record |= run_worker("quantize", quantizer.python, job, env, work, options.timeout)
    if "error" in record:
        return record
    try:
        folder = saved_folder(output)
    except FileNotFoundError as error:
        return record | {"error": str(error)}
    weights = [file for pattern in ("*.safetensors", "*.gguf") for file in folder.glob(pattern)]
    record["weight_bytes"] = sum(file.stat().st_size for file in weights)
    job |= {"output": str(folder), "test": str(Path(options.test).resolve())}
    env = child_environment(options.threads, None)
    record |= run_worker("evaluate", sys.executable, job, env, work, options.timeout)
    record["ok"] = "error" not in record
    if not options.keep:
        shutil.rmtree(output, ignore_errors=True)
    return record


def read_results(file: Path, key: tuple[str, ...] = KEY) -> dict[tuple[Any, ...], Record]:
    """The successful records of a results file by the fields of ``key``, the last one of each case."""
    found: dict[tuple[Any, ...], Record] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line) if line.strip() else {}
            if record.get("ok"):
                found[tuple(record[field] for field in key)] = record
    return found


def cases(options: argparse.Namespace, tags: list[str]) -> Iterator[Record]:
    """All cases, the interpreters taking turns within each row so that both meet the same machine."""
    for seed in (int(seed) for seed in options.seeds.split(",")):
        for recipe in options.recipes.split(","):
            for row in options.rows.split(","):
                for tag in tags:
                    yield {
                        "tag": tag,
                        "row": row,
                        "recipe": recipe,
                        "seed": seed,
                        "nsamples": options.nsamples,
                        "seqlen": options.seqlen,
                        "threads": options.threads,
                    }


def summary(record: Record) -> str:
    """One line about a finished case."""
    head = f"{record['tag']} {record['row']}/{record['recipe']} seed {record['seed']}: "
    if not record["ok"]:
        return head + record["error"]
    return head + (
        f"ppl {record['ppl']:.3f} KL {record['kl']:.5f} top-1 {100 * record['top1']:.2f} % "
        f"wall {record['wall_s']:.1f} s CPU {record['tree_cpu_s']:.1f} s peak {record['peak_rss_mb']:.0f} MB"
    )


def keep_result(results: Path, record: Record) -> None:
    """Append a record to the results and say it on one line."""
    with results.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
    print(summary(record), flush=True)


def workplace(options: argparse.Namespace) -> tuple[Path, Path, str]:
    """The results file, a folder to work in and the name of this run; a polite kill ends what runs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = Path(options.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    work = Path(options.work or tempfile.mkdtemp(prefix="quality-")).resolve()
    (work / "logs").mkdir(parents=True, exist_ok=True)
    return results, work, f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"


def drive(options: argparse.Namespace) -> int:
    """Run what is not in the results file yet; the number of failures."""
    pythons = dict(item.split("=", 1) for item in options.python)
    paths = dict(item.split("=", 1) for item in options.path)
    results, work, run = workplace(options)
    done = {} if options.force else read_results(results)
    failures = 0
    for case in cases(options, list(pythons)):
        if tuple(case[key] for key in KEY) in done:
            continue
        quantizer = Quantizer(pythons[case["tag"]], paths.get(case["tag"]))
        record = {"run": run} | measure(case, quantizer, options, work)
        failures += not record["ok"]
        keep_result(results, record)
    return failures


def evaluate_folder(options: argparse.Namespace) -> int:
    """Measure one saved folder, or the original itself, and print the figures."""
    with tempfile.TemporaryDirectory(prefix="quality-") as name:
        job = {
            "model": str(Path(options.model).resolve()),
            "output": str(saved_folder(Path(options.evaluate).resolve())),
            "test": str(Path(options.test).resolve()),
            "threads": options.threads,
            "report": str(Path(name) / "report.json"),
            "log": str(Path(name) / "log"),
        }
        env = child_environment(options.threads, None)
        record = run_worker("evaluate", sys.executable, job, env, Path(name), options.timeout)
    print(record.get("tail", "") if "error" in record else json.dumps(record))
    return int("error" in record)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int) -> str:
    """Mean, and the smallest and largest value when there are several."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def figures_table(records: list[Record]) -> list[str]:
    """A line per row, recipe and tag: means over the seeds and their ranges."""
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record["row"], record["recipe"], record["tag"]].append(record)
    lines = [
        "| row | recipe | tag | seeds | ppl | KL | top-1 % | wall s | tree CPU s | peak RSS MB | over imports MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (row, recipe, tag), group in groups.items():
        columns = {key: [record[key] for record in group] for key in ("ppl", "kl", "wall_s", "tree_cpu_s")}
        top1 = [100 * record["top1"] for record in group]
        peak = [record["peak_rss_mb"] for record in group]
        added = [record["peak_rss_mb"] - record["import_rss_mb"] for record in group]
        cells = [row, recipe, tag, str(len(group)), spread(columns["ppl"], 3), spread(columns["kl"], 5)]
        cells += [spread(top1, 2), spread(columns["wall_s"], 1), spread(columns["tree_cpu_s"], 1)]
        cells += [f"{max(peak):.0f}", f"{max(added):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def ratios_table(records: list[Record], baseline: str) -> list[str]:
    """What every other tag takes in proportion to the baseline, from pairs of the same seed and the same run."""
    identity = ("run", *KEY[1:])
    base = {tuple(record[key] for key in identity): record for record in records if record["tag"] == baseline}
    groups: dict[tuple[str, str, str], list[tuple[Record, Record]]] = defaultdict(list)
    for record in records:
        partner = base.get(tuple(record[key] for key in identity))
        if record["tag"] != baseline and partner is not None:
            groups[record["row"], record["recipe"], record["tag"]].append((record, partner))
    if not groups:
        return []
    measures = {"KL": "kl", "wall": "wall_s", "tree CPU": "tree_cpu_s", "peak RSS": "peak_rss_mb"}
    lines = ["", f"Ratios to {baseline}, pairs of one run:", ""]
    lines += [f"| row | recipe | tag | pairs | {' | '.join(measures)} |", "|---" * (4 + len(measures)) + "|"]
    for (row, recipe, tag), pairs in groups.items():
        cells = [spread([mine[key] / theirs[key] for mine, theirs in pairs], 3) for key in measures.values()]
        lines.append(f"| {row} | {recipe} | {tag} | {len(pairs)} | {' | '.join(cells)} |")
    return lines


def print_table(options: argparse.Namespace) -> None:
    """Print the tables of a results file as Markdown, rows and recipes in the order asked for."""
    rows, recipes, seeds = options.rows.split(","), options.recipes.split(","), options.seeds.split(",")
    settings = (options.nsamples, options.seqlen, options.threads)
    records = [
        record
        for record in read_results(Path(options.results)).values()
        if record["row"] in rows
        and record["recipe"] in recipes
        and str(record["seed"]) in seeds
        and (record["nsamples"], record["seqlen"], record["threads"]) == settings
    ]
    records.sort(key=lambda record: (rows.index(record["row"]), recipes.index(record["recipe"]), record["tag"]))
    print("\n".join(figures_table(records) + ratios_table(records, options.baseline)))


def parse_options() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the original model")
    parser.add_argument("--calib", help="calibration records, a .jsonl file of {text}")
    parser.add_argument("--test", help="held-out text, documents separated by a line <|doc|>")
    parser.add_argument("--python", action="append", default=[], metavar="TAG=INTERPRETER")
    parser.add_argument("--path", action="append", default=[], metavar="TAG=DIR", help="import path for one tag")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--recipes", default="rtn,opt_rtn,default", help=", ".join(RECIPES))
    parser.add_argument("--seeds", default="42,43,44")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--results", default="quality.jsonl")
    parser.add_argument("--work", help="folder for outputs and logs (default: a temporary one)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one process")
    parser.add_argument("--keep", action="store_true", help="keep the saved models")
    parser.add_argument("--force", action="store_true", help="measure again what is already there")
    parser.add_argument("--evaluate", metavar="DIR", help="only measure this saved folder")
    parser.add_argument("--table", action="store_true", help="only print the results as Markdown")
    parser.add_argument("--baseline", default="peer", help="the tag that ratios are taken to")
    parser.add_argument("--quantize-worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--evaluate-worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quantize_worker or options.evaluate_worker or options.table:
        return options
    needed = ["model", "test"] + ([] if options.evaluate else ["calib", "python"])
    if absent := [f"--{name}" for name in needed if not getattr(options, name)]:
        parser.error(f"needed: {', '.join(absent)}")
    return options


def main() -> int:
    """Entry point; the number of failures."""
    options = parse_options()
    if options.quantize_worker:
        quantize_worker(options.quantize_worker)
    elif options.evaluate_worker:
        evaluate_worker(options.evaluate_worker)
    elif options.table:
        print_table(options)
    elif options.evaluate:
        return evaluate_folder(options)
    else:
        return drive(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
