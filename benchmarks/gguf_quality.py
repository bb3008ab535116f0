#!/usr/bin/env python
"""GGUF file types: our weights against those of llama.cpp's own quantizer, with and without an importance matrix.

Every tensor gets the type that llama.cpp's mixture gives it; what differs is who finds the numbers. The dequantized
weights are put into an fp32 copy of the original, which is compared with the original on the windows of quality.py.

    python benchmarks/gguf_quality.py --model DIR --text calib.jsonl --test test.txt --ggml LIB --out gguf.jsonl
    python benchmarks/gguf_quality.py --out gguf.jsonl --table

(The file is not called gguf.py: it would then be imported in the place of the package of that name.)
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gguf
import numpy as np
import torch
from _checkpoints import load_original, weight_of
from quality import compare, test_windows

from auto_round import AutoRound
from auto_round.algorithms.base import oriented, put_weights
from auto_round.formats.gguf_tensors import layer_kind
from auto_round.plan import ModelPlan

Record = dict[str, Any]
Importance = Mapping[str, torch.Tensor]

KEY = ("model", "type", "method", "options", "nsamples", "seqlen")
PLAIN, IMATRIX, OUTPUT_TOO = "llama.cpp", "llama.cpp imatrix", "llama.cpp imatrix, output too"
CALIBRATION_BATCH = 8


class Ggml:
    """llama.cpp's quantizer, out of its shared library `libggml-base`."""

    def __init__(self, library: Path):
        self._quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
        pointer, whole = ctypes.POINTER(ctypes.c_float), ctypes.c_int64
        self._quantize.argtypes = (ctypes.c_int, pointer, ctypes.c_void_p, whole, whole, whole, pointer)
        self._quantize.restype = ctypes.c_size_t

    def quantized(self, weight: torch.Tensor, kind: str, importance: torch.Tensor | None) -> torch.Tensor:
        """float32 [out, in] as the gguf package reads what llama.cpp makes of it; importance [in] of its inputs."""
        number = gguf.GGMLQuantizationType[kind]
        rows, columns = weight.shape
        weights, size = gguf.GGML_QUANT_SIZES[number]
        packed = np.zeros((rows, columns // weights * size), dtype=np.uint8)
        source = np.ascontiguousarray(weight.numpy(), dtype=np.float32)
        matter = None if importance is None else _pointer(np.ascontiguousarray(importance.numpy(), dtype=np.float32))
        written = self._quantize(number, _pointer(source), packed.ctypes.data, 0, rows, columns, matter)
        if written != packed.nbytes:
            raise ValueError(f"{kind}: the library wrote {written} bytes, and the gguf package expects {packed.nbytes}")
        return torch.from_numpy(gguf.quants.dequantize(packed, number))


def _pointer(values: np.ndarray) -> Any:
    return values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


class Bench:
    """What all rows of one run share: the original, the windows it is tested on and the importance matrix."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.original = load_original(options.model)

    @cached_property
    def windows(self) -> torch.Tensor:
        return test_windows(self.options.model, self.options.test)

    def compressor(self, file_type: str, iters: int) -> Any:
        chosen = self.options
        return AutoRound(
            str(chosen.model),
            scheme=f"GGUF:{file_type}",
            iters=iters,
            dataset=str(chosen.text),
            nsamples=chosen.nsamples,
            seqlen=chosen.seqlen,
            device_map="cpu",
            show_progress=False,
            **chosen.options,
        )

    def ours(self, file_type: str, iters: int) -> Record:
        """Quantize with auto_round. The store's numbers are taken, for the model itself computes in bfloat16."""
        began = time.process_time()
        run = self.compressor(file_type, iters)
        store = run.run()
        seconds = time.process_time() - began
        model = load_original(self.options.model)
        for part in run.plan.parts:
            layers = run.plan.quantized(part)
            put_weights(model, "", store.load(part, layers).tensors, layers)
        return {"cpu_s": seconds, **compare(model, self.original, self.windows)}

    @torch.no_grad()
    def quantized(self, file_type: str, importance: Importance) -> tuple[torch.nn.Module, float]:
        """The model as llama.cpp quantizes it, and CPU seconds; layers without importance as without a matrix."""
        plan, ggml = self.compressor(file_type, 0).plan, Ggml(self.options.ggml)
        model = load_original(self.options.model)
        began = time.process_time()
        for name, layer in plan.quantized().items():
            weight = weight_of(model, name)
            found = ggml.quantized(oriented(weight, layer), layer_kind(layer), importance.get(name))
            weight.copy_(oriented(found, layer))
        return model, time.process_time() - began

    def theirs(self, file_type: str, importance: Importance) -> Record:
        model, seconds = self.quantized(file_type, importance)
        return {"cpu_s": seconds, **compare(model, self.original, self.windows)}

    @cached_property
    def imatrix(self) -> tuple[Importance, float]:
        """Mean square of every layer's inputs in the original model, as llama-imatrix collects it; CPU seconds."""
        run = self.compressor(self.options.types[0], 0)
        run.load_data()
        began = time.process_time()
        ids = torch.cat([sample["input_ids"] for sample in run.samples])
        return mean_squares(self.original, run.plan, ids), time.process_time() - began

    def block_importance(self) -> Importance:
        """The importance matrix without the model's ends, which llama-imatrix leaves out by default."""
        return {name: h for name, h in self.imatrix[0].items() if _in_block(self.original, name)}

    def with_imatrix(self, file_type: str, output_too: bool) -> Record:
        importance, seconds = self.imatrix
        found = self.theirs(file_type, importance if output_too else self.block_importance())
        return {**found, "cpu_s": found["cpu_s"] + seconds, "imatrix_cpu_s": seconds}


def bench_for(job: Record) -> Bench:
    """A bench for one row of frontier.py, which says in its job what is quantized and with which text."""
    chosen = {"model": Path(job["model"]), "text": job["calib"], "ggml": job["ggml"], "types": [job["row"]]}
    counts = {key: job[key] for key in ("nsamples", "seqlen")}
    return Bench(argparse.Namespace(**chosen, **counts, options={"seed": job["seed"]}))


def _in_block(model: torch.nn.Module, name: str) -> bool:
    """Whether a layer is none of the model's ends: llama-imatrix leaves them out unless told --process-output."""
    return model.get_submodule(name) not in (model.get_input_embeddings(), model.get_output_embeddings())


@torch.no_grad()
def mean_squares(model: torch.nn.Module, plan: ModelPlan, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """float32 [in] for every quantized layer that multiplies (an embedding does not), over all tokens of ids [n, L]."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            squares = args[0].flatten(0, -2).double().square().sum(0)
            sums[name] = sums.get(name, 0) + squares

        return add

    with ExitStack() as hooks:
        for name in plan.quantized():
            module = model.get_submodule(name)
            if not isinstance(module, torch.nn.Embedding):
                hooks.callback(module.register_forward_pre_hook(hook(name)).remove)
        for batch in ids.split(CALIBRATION_BATCH):
            model(input_ids=batch, use_cache=False)
    return {name: (total / ids.numel()).float() for name, total in sums.items()}


def rows(options: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[Bench], Record]]]:
    """(file type, method, how to measure it), in the order in which they run."""
    for kind in options.types:
        if options.ggml:
            yield kind, PLAIN, lambda bench, kind=kind: bench.theirs(kind, {})
            yield kind, IMATRIX, lambda bench, kind=kind: bench.with_imatrix(kind, False)
            yield kind, OUTPUT_TOO, lambda bench, kind=kind: bench.with_imatrix(kind, True)
        for iters in options.iters:
            yield kind, f"ours, {iters} iterations", lambda bench, k=kind, i=iters: bench.ours(k, i)


def read_results(file: Path) -> list[Record]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.strip()]


def drive(options: argparse.Namespace) -> None:
    """Measure every row that is not in the results yet, one after another."""
    torch.set_num_threads(options.threads)
    done = {tuple(record[key] for key in KEY) for record in read_results(options.out)}
    bench: Bench | None = None
    for kind, method, measure in rows(options):
        asked = json.dumps(options.options, sort_keys=True) if method.startswith("ours") else "{}"
        case = dict(zip(KEY, (options.model.name, kind, method, asked, options.nsamples, options.seqlen), strict=True))
        if tuple(case.values()) in done:
            continue
        bench = bench or Bench(options)
        record = {**case, **measure(bench)}
        with options.out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        print(line_of(record), flush=True)


def line_of(record: Record) -> str:
    """A row of the table."""
    options = json.loads(record["options"])
    method = ", ".join([record["method"], *(f"{name} {value}" for name, value in options.items())])
    figures = f"{record['ppl']:.3f} | {record['kl']:.5f} | {100 * record['top1']:.2f} | {record['cpu_s']:.1f}"
    return f"| {record['type']} | {method} | {figures} |"


def names(value: str) -> list[str]:
    return [part.strip().upper() for part in value.split(",")]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the original model")
    parser.add_argument("--text", type=Path, help="calibration records, a .jsonl file of {text}")
    parser.add_argument("--test", type=Path, help="held-out text, documents separated by a line <|doc|>")
    parser.add_argument("--types", type=names, default=names("Q4_K_M,Q2_K_S,Q3_K_M"))
    parser.add_argument("--iters", type=lambda v: [int(i) for i in v.split(",")], default=[0, 50, 200])
    parser.add_argument("--ggml", type=Path, help="llama.cpp's libggml-base; without it only our rows are measured")
    parser.add_argument("--options", type=json.loads, default={}, help='more arguments of AutoRound: {"lr": 0.01}')
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="results; what is there is not measured again")
    parser.add_argument("--table", action="store_true", help="only print the results as Markdown")
    options = parser.parse_args()
    missing = [f"--{name}" for name in ("model", "text", "test") if getattr(options, name) is None]
    if missing and not options.table:
        parser.error(f"needed: {', '.join(missing)}")
    if options.ggml and not options.ggml.is_file():
        parser.error(f"--ggml: there is no file {options.ggml}; tools/clients.sh llamacpp makes one")
    return options


def main() -> None:
    options = parse_options()
    if not options.table:
        drive(options)
        return
    print("| type | method | perplexity | KL | top-1 % | CPU s |\n|---|---|---|---|---|---|")
    records = read_results(options.out)
    types = list(dict.fromkeys(record["type"] for record in records))
    for record in sorted(records, key=lambda record: types.index(record["type"])):
        print(line_of(record))


if __name__ == "__main__":
    main()
