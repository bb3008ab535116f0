"""Packing and writing: MB of bfloat16 weights per second of one core, and memory, for each format.

A random Llama is quantized once per scheme (rounding to nearest); then each format is written from the store in a
process of its own, with one thread. Time is that of the processor; memory is the peak above what was there before,
for a model and for one of twice as many blocks: it should not grow.

    python benchmarks/export.py [--layers 4] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

FORMATS = {
    "W4A16G32": ("auto_round", "auto_gptq", "auto_awq", "llm_compressor", "mlx", "gguf:q4_0"),
    "W3A16": ("auto_round",),
    "MXFP4": ("auto_round", "llm_compressor"),
    "NVFP4": ("llm_compressor",),
    "FP8_BLOCK": ("fp8",),
    "INT8": ("llm_compressor",),
    "GGUF:Q4_K_M": ("gguf:q4_k_m",),
    "GGUF:Q2_K_S": ("gguf:q2_k_s",),
}
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "SCHEME", "FORMATS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(Path(options.one[0]), options.one[1], options.one[2].split(","))
        return
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        models = [make_model(Path(folder), layers) for layers in (options.layers, 2 * options.layers)]
        print(
            f"{'scheme':12} {'format':16} {'MB/s per core':>14} {'peak MB':>8} {'peak MB, twice the blocks':>26}",
            flush=True,
        )
        for scheme, names in FORMATS.items():
            rows = [run_one(model, scheme, names) for model in models]
            for name, one, two in zip(names, *rows, strict=True):
                print(f"{scheme:12} {name:16} {one[0]:14.0f} {one[1]:8.0f} {two[1]:26.0f}", flush=True)


def make_model(folder: Path, layers: int) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_hidden_layers=layers, vocab_size=4096, tie_word_embeddings=False)
    target = folder / f"llama-{layers}"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target, max_shard_size="200MB")
    return target


def run_one(model: Path, scheme: str, names: tuple[str, ...]) -> list[tuple[float, float]]:
    """(MB/s, MB) of each format."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", str(model), scheme, ",".join(names)]
    shown = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [tuple(map(float, line.split()[1:])) for line in shown.splitlines() if line.startswith("ROW")]


def measure(model: Path, scheme: str, names: list[str]) -> None:
    import torch

    from auto_round import AutoRound
    from auto_round.formats import make_format
    from auto_round.formats.export import write_folder

    torch.set_num_threads(1)
    text = [torch.arange(64).view(1, -1)]  # schemes with fixed scales for activations want some
    run = AutoRound(
        str(model),
        scheme=scheme,
        iters=0,
        disable_opt_rtn=True,
        show_progress=False,
        dataset=text,
        nsamples=1,
        seqlen=64,
    )
    store = run.run(model.parent / f"{model.name}-{scheme.replace(':', '-')}.work")
    weights = sum(layer.info.numel * layer.info.dtype.itemsize for layer in run.plan.quantized().values()) / 1e6
    for name in names:
        fmt = make_format(name, run.plan)
        write = fmt.write_folder or functools.partial(write_folder, fmt=fmt)
        with tempfile.TemporaryDirectory(dir=model.parent) as out:
            before, began = reset_peak(), time.process_time()
            write(Path(out) / "x", run.streamed, run.plan, store, source_dir=model, tokenizer=None, settings={})
            seconds = time.process_time() - began
            print("ROW", weights / seconds, status("VmHWM") - before, flush=True)


def reset_peak() -> float:
    """Forget the peak so far; returns the memory in use, in MB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return status("VmRSS")


def status(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


if __name__ == "__main__":
    main()
