#!/usr/bin/env python
"""Time of this quantizer against another one, at equal results, in one run.

Three kinds of cases, each quantized and saved by a fresh process of either interpreter, one after the other:

- `tuned`: a trained model at W4A16, group 128, tuned; results are compared by KL divergence on held-out text.
- `blocks`: two blocks of a random Llama with 0.5 B parameters, tuned; results are compared by the mean squared error of
  each block's output on calibration samples, the blocks before it being quantized, too.
- `rtn`, `opt_rtn`: the trained model rounded to nearest, without and with searched scales, end to end.

Seconds are those of CPU time of the process and its children, imports included; wall time is printed beside.

    python benchmarks/tuning.py --model DIR --calib FILE --test FILE --peer PYTHON [--cases tuned,rtn] [--iters 100]
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quality
from _checkpoints import load_decoded, load_original

if TYPE_CHECKING:
    import torch

HIDDEN, INTERMEDIATE, HEADS, GROUPS, BLOCKS = 1280, 3456, 20, 5, 2
CASES = ("tuned", "blocks", "rtn", "opt_rtn")
JUDGED = 16  # samples on which blocks are compared


def make_blocks(folder: Path, tokenizer: Path) -> Path:
    """Two blocks of a Llama of 0.5 B parameters (24 of them and a vocabulary of 32 000), with random weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
        num_hidden_layers=BLOCKS, vocab_size=len(tokens), max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def block_losses(folder: Path, original: Path, test: Path) -> list[float]:
    """Mean squared error of each block's output, in float32, on text that neither quantizer has seen."""
    import torch

    ids = quality.test_windows(original, test)[:JUDGED]
    states = []
    for model in (load_original(original), load_decoded(folder, original)):
        seen: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.register_forward_hook(
                lambda module, args, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
            )
        with torch.inference_mode():
            for row in ids:
                model(input_ids=row[None], use_cache=False)
        states.append(seen)
    errors = [(a - b).square().mean().item() for a, b in zip(*states, strict=True)]
    return [sum(errors[block::BLOCKS]) / len(ids) for block in range(BLOCKS)]


def measure(case: str, tag: str, python: str, model: Path, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Cost and quality of one quantized folder."""
    output = work / f"{case}-{tag}"
    shutil.rmtree(output, ignore_errors=True)
    recipe = case if case in ("rtn", "opt_rtn") else "default"
    job = {
        "package": "auto_round", "model": str(model), "output": str(output), "threads": options.threads,
        "row": "W4g128", "recipe": recipe, "seed": 42, "calib": str(Path(options.calib).resolve()),
        "nsamples": options.nsamples, "seqlen": options.seqlen,
        "arguments": {"iters": options.iters, "lr": options.lr} if tag == "ours" and recipe == "default" else {},
        "report": str(work / "report.json"), "log": str(work / f"{case}-{tag}.log"),
    }  # fmt: skip
    path = str(Path(__file__).resolve().parents[1]) if tag == "ours" else None
    env = quality.child_environment(options.threads, path)
    found = quality.run_worker("quantize", python, job, env, work, options.timeout)
    if "error" in found:
        raise SystemExit(f"{case} {tag}: {found['error']}\n{found['tail']}")
    folder = quality.saved_folder(output)
    if case == "blocks":
        found["losses"] = block_losses(folder, model, Path(options.test))
    else:
        job |= {"output": str(folder), "test": str(Path(options.test).resolve())}
        found |= quality.run_worker("evaluate", sys.executable, job, env, work, options.timeout)
    shutil.rmtree(output, ignore_errors=True)
    return found


def line(case: str, tag: str, found: dict[str, Any], other: dict[str, Any]) -> str:
    if "losses" in found:
        result = "block MSE " + ", ".join(f"{loss:.4g}" for loss in found["losses"])
    else:
        result = f"KL {found['kl']:.5f}"
    share = found["tree_cpu_s"] / other["tree_cpu_s"]
    cost = f"{found['tree_cpu_s']:.0f} | {found['process_s']:.0f} | {share:.2f} | {found['peak_rss_mb']:.0f}"
    return f"| {case} | {tag} {found['version']} | {result} | {cost} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--peer", required=True, help="interpreter that has the other quantizer installed")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--iters", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=3600)
    options = parser.parse_args()
    importlib.import_module("torch").set_num_threads(options.threads)
    print("| case | quantizer | result | CPU s | wall s | of the peer's CPU | peak RSS MiB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work, model = Path(folder), Path(options.model).resolve()
        for case in options.cases.split(","):
            source = make_blocks(work / "blocks", model) if case == "blocks" else model
            peer = measure(case, "peer", options.peer, source, options, work)
            print(line(case, "peer", peer, peer), flush=True)
            print(line(case, "ours", measure(case, "ours", sys.executable, source, options, work), peer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
