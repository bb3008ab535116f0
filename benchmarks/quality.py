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
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

Record = dict[str, Any]

RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"iters": 0, "disable_opt_rtn": True},
    "opt_rtn": {"iters": 0},
    "light": {"iters": 50, "lr": 5e-3},
    "default": {"iters": 200},
    "best": {"iters": 1000},
}
ROWS = "W4g128,W4g32,W3g128,W2g64,W2g32"
KEY = ("tag", "row", "recipe", "seed", "nsamples", "seqlen", "threads")
BATCH_SIZE = 8

EVAL_SEQLEN = 512
EVAL_WINDOWS = 120
KL_WINDOWS = 48
EVAL_BATCH = 4
WORD_BITS = 32
DOCUMENT_BREAK = re.compile(r"\n?\n<\|doc\|>\n\n?")
PACKED_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


# ---------------------------------------------------------------------------------------------------------------------
# Quantizing: runs in the interpreter under test
# ---------------------------------------------------------------------------------------------------------------------


def parse_row(row: str) -> dict[str, Any]:
    """Turn a row name such as ``W4g128`` into the scheme arguments of ``AutoRound``."""
    match = re.fullmatch(r"W(\d+)g(-?\d+)", row)
    if match is None:
        raise ValueError(f"a row looks like W4g128, not {row!r}")
    return {"scheme": f"W{match[1]}A16", "group_size": int(match[2])}


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
    package = importlib.import_module("auto_round")
    from auto_round import AutoRound

    report["import_s"] = time.perf_counter() - started
    report["version"] = str(getattr(package, "__version__", "unknown"))
    report["torch"] = str(torch.__version__)
    report["import_cpu_s"] = cpu_seconds()
    started = time.perf_counter()
    compressor = AutoRound(job["model"], **job["arguments"])
    compressor.quantize_and_save(job["output"], format="auto_round")
    report["wall_s"] = time.perf_counter() - started
    report["peak_rss_mb"] = peak_rss_mib()
    report["child_peak_rss_mb"] = peak_rss_mib(resource.RUSAGE_CHILDREN)
    Path(job["report"]).write_text(json.dumps(report), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: runs in the calling interpreter, in a process of its own
# ---------------------------------------------------------------------------------------------------------------------


def unpack_codes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Decode ``count`` unsigned codes from the little-endian bit stream in each column of int32 ``words``."""
    import torch

    blocks = -(-count // WORD_BITS)  # 32 codes always fill exactly ``bits`` words
    words = words.to(torch.int64) & 0xFFFFFFFF
    if words.shape[0] < blocks * bits:
        words = torch.nn.functional.pad(words, (0, 0, 0, blocks * bits - words.shape[0]))
    stream = words[: blocks * bits].reshape(blocks, bits, -1)
    codes = torch.empty(blocks, WORD_BITS, stream.shape[-1], dtype=torch.int64)
    for position in range(WORD_BITS):
        word, shift = divmod(position * bits, WORD_BITS)
        value = stream[:, word] >> shift
        if shift + bits > WORD_BITS:
            value = value | (stream[:, word + 1] << (WORD_BITS - shift))
        codes[:, position] = value & ((1 << bits) - 1)
    return codes.reshape(blocks * WORD_BITS, -1)[:count]


def layer_setting(config: Record, name: str, key: str) -> int:
    """The value of ``key`` for layer ``name``: its own in ``extra_config`` (exact or pattern), else the general one."""
    extra = config.get("extra_config") or {}
    entry = extra.get(name)
    if entry is None:
        entry = next((value for pattern, value in extra.items() if re.fullmatch(pattern, name)), {})
    value = entry.get(key)
    return int(config[key] if value is None else value)


def stored_zero_offset(config: Record) -> int:
    """What has to be added to a stored zero point: 1 for the first GPTQ layout, 0 where it is stored as it is."""
    packing = str(config.get("packing_format", ""))
    method = config.get("quant_method")
    if "awq" in packing or method == "awq":
        raise ValueError("the AWQ layout is not read by this evaluation")
    if method == "gptq":
        return int(config.get("checkpoint_format", "gptq") != "gptq_v2")
    return int("gptq" in packing and "gptqmodel" not in packing)


def group_index(tensors: dict[str, torch.Tensor], name: str, config: Record, columns: int) -> torch.Tensor:
    """The group of every input column: the stored index, else runs whose length follows from the rows of scales."""
    import torch

    if f"{name}.g_idx" in tensors:
        return tensors[f"{name}.g_idx"].long()
    rows = tensors[f"{name}.scales"].shape[0]
    size = layer_setting(config, name, "group_size")
    if size <= 0 or -(-columns // size) != rows:
        size = -(-columns // rows)
    if -(-columns // size) != rows:
        raise ValueError(f"{name}: {rows} rows of scales do not divide {columns} columns into groups")
    return torch.arange(columns) // size


def decode_layer(tensors: dict[str, torch.Tensor], name: str, config: Record, shape: torch.Size) -> torch.Tensor:
    """The fp32 weight of shape [out, in] that a packed layer stands for."""
    out_features, in_features = shape
    qweight = tensors[f"{name}.qweight"]
    bits = layer_setting(config, name, "bits")
    if qweight.shape[0] * WORD_BITS != in_features * bits or qweight.shape[1] != out_features:
        raise ValueError(f"{name}: qweight {tuple(qweight.shape)} is not a {bits}-bit packing of {tuple(shape)}")
    codes = unpack_codes(qweight, bits, in_features)
    zeros = unpack_codes(tensors[f"{name}.qzeros"].t(), bits, out_features).t()
    zeros = (zeros + stored_zero_offset(config)) & ((1 << bits) - 1)
    groups = group_index(tensors, name, config, in_features)
    scales = tensors[f"{name}.scales"].float()
    return ((codes - zeros[groups]).float() * scales[groups]).t()


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files in ``folder``."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def load_original(folder: Path) -> torch.nn.Module:
    """The unquantized model in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_decoded(folder: Path, original: Path) -> torch.nn.Module:
    """An fp32 copy of the original that holds the decoded weights saved in ``folder``."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if config is None:
        return load_original(folder)
    tensors = read_tensors(folder)
    model = load_original(original)
    state = model.state_dict()
    packed = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    if not packed:
        raise ValueError("no packed layer found")
    missing = set(state)
    for name in packed:
        key = f"{name}.weight"
        state[key].copy_(decode_layer(tensors, name, config, state[key].shape))
        missing.discard(key)
    for key, value in tensors.items():
        if key in state:
            state[key].copy_(value.float())
            missing.discard(key)
        elif key.rsplit(".", 1)[-1] not in PACKED_SUFFIXES:
            raise ValueError(f"{key} has no place in the original model")
    if model.config.tie_word_embeddings:
        missing.discard("lm_head.weight")
    if missing:
        raise ValueError(f"not saved: {sorted(missing)}")
    return model


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


def saved_folder(output: Path) -> Path:
    """The folder at or below ``output`` that holds a model (the API may append a name of its own)."""
    configs = sorted(output.rglob("config.json"), key=lambda path: len(path.parts))
    if not configs:
        raise FileNotFoundError(f"nothing saved below {output}")
    return configs[0].parent


def call_arguments(row: str, recipe: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``AutoRound``, the same for every implementation."""
    return {
        **parse_row(row),
        **RECIPES[recipe],
        "dataset": str(Path(options.calib).resolve()),
        "nsamples": options.nsamples,
        "seqlen": options.seqlen,
        "batch_size": BATCH_SIZE,
        "seed": seed,
        "device_map": "cpu",
        "enable_torch_compile": False,
    }


def measure(case: Record, python: str, path: str | None, options: argparse.Namespace, work: Path) -> Record:
    """Quantize and evaluate one case; its record for the results file."""
    name = f"{case['tag']}_{case['row']}_{case['recipe']}_{case['seed']}"
    output = work / "out" / name
    shutil.rmtree(output, ignore_errors=True)
    job = {
        "model": str(Path(options.model).resolve()),
        "output": str(output),
        "threads": options.threads,
        "arguments": call_arguments(case["row"], case["recipe"], case["seed"], options),
        "report": str(work / "report.json"),
        "log": str(work / "logs" / f"{name}.log"),
    }
    Path(job["log"]).unlink(missing_ok=True)
    record = {**case, "ok": False, "when": time.strftime("%Y-%m-%dT%H:%M:%S"), "load1": os.getloadavg()[0]}
    record |= run_worker("quantize", python, job, child_environment(options.threads, path), work, options.timeout)
    if "error" in record:
        return record
    try:
        folder = saved_folder(output)
    except FileNotFoundError as error:
        return record | {"error": str(error)}
    record["weight_bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    job |= {"output": str(folder), "test": str(Path(options.test).resolve())}
    env = child_environment(options.threads, None)
    record |= run_worker("evaluate", sys.executable, job, env, work, options.timeout)
    record["ok"] = "error" not in record
    if not options.keep:
        shutil.rmtree(output, ignore_errors=True)
    return record


def read_results(file: Path) -> dict[tuple[Any, ...], Record]:
    """The successful records of a results file, the last one of each case."""
    found: dict[tuple[Any, ...], Record] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line) if line.strip() else {}
            if record.get("ok"):
                found[tuple(record[key] for key in KEY)] = record
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


def drive(options: argparse.Namespace) -> int:
    """Run what is not in the results file yet; the number of failures."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    pythons = dict(item.split("=", 1) for item in options.python)
    paths = dict(item.split("=", 1) for item in options.path)
    results = Path(options.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    work = Path(options.work or tempfile.mkdtemp(prefix="quality-")).resolve()
    (work / "logs").mkdir(parents=True, exist_ok=True)
    done = {} if options.force else read_results(results)
    run = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    failures = 0
    for case in cases(options, list(pythons)):
        if tuple(case[key] for key in KEY) in done:
            continue
        record = {"run": run} | measure(case, pythons[case["tag"]], paths.get(case["tag"]), options, work)
        failures += not record["ok"]
        with results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        print(summary(record), flush=True)
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
