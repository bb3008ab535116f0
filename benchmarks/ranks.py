"""What more ranks are worth: tuning one model with 1 and 2 processes on this machine, and a model of the cost to 64.

Every run is a fresh process with one thread, so 2 ranks have two cores. A step's time is the median over all blocks:
wall time, and processor time, which other programs on the machine do not lengthen. Modelled times follow from the
measured ones by

    step(N) = fixed + per_sample * samples / N + 2 (N - 1) / N * bytes / bandwidth + 2 (N - 1) * latency

for a ring, in which each rank sends and receives that many bytes; computing and sending do not overlap.

    python benchmarks/ranks.py --model DIR --dataset FILE --folder DIR [--bandwidth 12.5] [--latency 20]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

RANKS = (1, 2, 4, 8, 16, 32, 64)


def work(model: str, out: str, options: dict[str, Any]) -> None:
    """One rank of one run; the first prints what was measured."""
    from auto_round import AutoRound
    from auto_round.progress import RunProgress
    from auto_round.ranks import Ranks

    walls: list[float] = []
    spent: list[float] = []
    reduced: list[int] = []
    last: dict[str, Any] = {}
    sum_, step = Ranks.sum_, RunProgress.step

    def counting(self: Ranks, *tensors: Any) -> None:
        reduced.append(sum(tensor.nbytes for tensor in tensors))
        sum_(self, *tensors)

    def timing(self: RunProgress, number: int, name: str, iteration: int, loss: float) -> None:
        wall, used = time.perf_counter(), time.process_time()
        if last.get("block") == name:
            walls.append(wall - last["wall"])
            spent.append(used - last["spent"])
        last.update(block=name, wall=wall, spent=used)
        step(self, number, name, iteration, loss)

    Ranks.sum_, RunProgress.step = counting, timing
    run = AutoRound(model, device_map="cpu", show_progress=False, **options)
    run.quantize_and_save(out)
    if run.ranks.main:
        found = {"wall": median(walls), "spent": median(spent), "bytes": max(reduced), "times": run.times}
        print(json.dumps({**found, "kl": run.report["kl"], "work": run.report["work_folder"]}))


def measure(arguments: argparse.Namespace, ranks: int, samples: int) -> dict[str, Any]:
    """A run of so many ranks with so many samples in a step (half of `batch_size`)."""
    options = {"iters": arguments.iters, "nsamples": arguments.nsamples, "seqlen": arguments.seqlen}
    options |= {"batch_size": 2 * samples, "dataset": arguments.dataset, "scheme": "W4A16"}
    out = str(arguments.folder / f"ranks{ranks}-samples{samples}")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, __file__, "--worker", arguments.model, out, json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def equal_codes(one: str, other: str) -> float:
    """Share of stored bytes of codes that are equal in two work folders."""
    from safetensors.torch import load_file

    same = total = 0
    for file in Path(one).glob("*.safetensors"):
        left, right = load_file(file), load_file(Path(other) / file.name)
        for name in left:
            if name.endswith(".codes"):
                same += (left[name] == right[name]).sum().item()
                total += left[name].numel()
    return same / total


def modelled(ranks: int, samples: int, cost: dict[str, float], link: dict[str, float]) -> float:
    """Seconds of a step; with more ranks than samples, each rank has one sample."""
    compute = cost["fixed"] + cost["sample"] * max(1.0, samples / ranks)
    return compute + 2 * (ranks - 1) / ranks * cost["bytes"] / link["bandwidth"] + 2 * (ranks - 1) * link["latency"]


def table(title: str, cost: dict[str, float], link: dict[str, float], sizes: tuple[int, ...]) -> None:
    print(f"\n{title}\n")
    print("| ranks | " + " | ".join(f"{size} samples a step, ms | times as fast" for size in sizes) + " |")
    print("|---" * (1 + 2 * len(sizes)) + "|")
    for ranks in RANKS:
        cells = []
        for size in sizes:
            seconds = modelled(ranks, size, cost, link)
            cells += [f"{1000 * seconds:.1f}", f"{modelled(1, size, cost, link) / seconds:.1f}"]
        print(f"| {ranks} | " + " | ".join(cells) + " |")


def large_model(flops: float) -> dict[str, float]:
    """A block of Llama-3-8B on an accelerator that reaches so many FLOP/s, samples of 2048 tokens; assumed."""
    weights = 218_103_808
    state = 40 * weights / 3e12  # bytes of rounding state read and written in a step, at 3 TB/s
    return {"fixed": state, "sample": 6 * weights * 2048 / flops, "bytes": 2 * weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True, help="calibration text")
    parser.add_argument("--folder", type=Path, required=True, help="where results go")
    parser.add_argument("--iters", type=int, default=12)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--bandwidth", type=float, default=12.5, help="of the link between ranks, GB/s each way")
    parser.add_argument("--latency", type=float, default=20, help="of one message, microseconds")
    arguments = parser.parse_args()
    runs = {(ranks, size): measure(arguments, ranks, size) for ranks, size in ((1, 4), (2, 4), (1, 2))}
    one, two, half = runs[1, 4], runs[2, 4], runs[1, 2]
    print("| ranks | samples a step | step, wall ms | of processor, ms | bytes reduced a step | tuning, s | KL |")
    print("|---" * 7 + "|")
    for (ranks, size), run in runs.items():
        reduced = f"{run['bytes']:,}" if ranks > 1 else "-"
        cells = (ranks, size, f"{1000 * run['wall']:.0f}", f"{1000 * run['spent']:.0f}", reduced)
        print("| " + " | ".join(map(str, (*cells, f"{run['times']['tune']:.1f}", f"{run['kl']:.5f}"))) + " |")
    wall, spent = one["wall"] / two["wall"], one["spent"] / two["spent"]
    print(f"\n1 rank over 2: wall time {wall:.2f}, of processor {spent:.2f}")
    print(f"codes equal with 1 and 2 ranks: {equal_codes(one['work'], two['work']):.4%} of bytes")
    sample = (one["spent"] - half["spent"]) / 2
    cost = {"fixed": one["spent"] - 4 * sample, "sample": sample, "bytes": two["bytes"]}
    link = {"bandwidth": arguments.bandwidth * 1e9, "latency": arguments.latency * 1e-6}
    table("This model here (modelled from processor time)", cost, link, (4, 64))
    for bandwidth in (arguments.bandwidth, 200):
        title = f"Llama-3-8B, 200 TFLOP/s, 2048 tokens a sample, {bandwidth:g} GB/s (assumed, not measured)"
        table(title, large_model(200e12), {**link, "bandwidth": bandwidth * 1e9}, (4, 64))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
    else:
        main()
