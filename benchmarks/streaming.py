"""Memory and time of quantizing a checkpoint much larger than the memory it may use.

Makes a random Llama of about 4 GiB in 8 shards (no model is ever built: shards are written tensor by tensor), runs
round-to-nearest W4A16 on it in a fresh process, and prints that process's peak memory above the bare import of torch
and transformers, and its time. With `--nsamples` scales are searched on so many samples, which pass through all blocks.
Several numbers of layers, one after the other, show that memory does not grow with them.

    python benchmarks/streaming.py --folder DIR [--layers 40,80] [--nsamples 16] [--shards 8] [--python PYTHON]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 2048, 5632, 32, 8192

WORKER = """
import json, re, sys, time
import torch, transformers
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
bare, began = peak(), time.perf_counter()
from auto_round import AutoRound
options = json.loads(sys.argv[3])
run = AutoRound(sys.argv[1], scheme="W4A16", iters=0, device_map="cpu", show_progress=False, **options)
_, folder = run.quantize_and_save(sys.argv[2])
print(json.dumps({"bare_mb": bare, "peak_mb": peak(), "above_mb": peak() - bare,
                  "seconds": time.perf_counter() - began, "working": run.report["working"],
                  "times": run.report["times"],
                  "checks": run.report["checks"], "kl": run.report["kl"], "sizes": run.report["sizes"]}))
"""


def config(layers: int, hidden: int = HIDDEN) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * INTERMEDIATE // HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden * HEADS // HIDDEN,
        "num_key_value_heads": hidden * HEADS // HIDDEN,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def options(nsamples: int) -> dict:
    if not nsamples:
        return {"disable_opt_rtn": True}
    ids = torch.randint(VOCABULARY, (nsamples + 4, 512), generator=torch.Generator().manual_seed(1))
    return {"dataset": ids.tolist(), "nsamples": nsamples, "seqlen": 512}


def shapes(layers: int, hidden: int = HIDDEN) -> dict[str, tuple[int, ...]]:
    wide = hidden * INTERMEDIATE // HIDDEN
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for i in range(layers):
        base = f"model.layers.{i}"
        found |= {f"{base}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        found |= {f"{base}.mlp.{p}_proj.weight": (wide, hidden) for p in ("gate", "up")}
        found[f"{base}.mlp.down_proj.weight"] = (hidden, wide)
        found |= {f"{base}.{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def make(folder: Path, layers: int, shards: int, hidden: int = HIDDEN) -> None:
    """Write the random checkpoint; every shard in its turn, so this needs one shard of memory."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(shapes(layers, hidden).items())
    generator = torch.Generator().manual_seed(0)
    weight_map, size = {}, -(-len(names) // shards)
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {}
        for name, shape in names[index * size : (index + 1) * size]:
            ones = len(shape) == 1
            value = torch.ones(shape) if ones else torch.randn(shape, generator=generator) * 0.02
            tensors[name] = value.bfloat16()
            weight_map[name] = file
        save_file(tensors, folder / file, {"format": "pt"})
    total = sum(torch.Size(shape).numel() * 2 for _, shape in names)
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json))
    (folder / "config.json").write_text(json.dumps(config(layers, hidden)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint and the result go")
    parser.add_argument("--layers", default="40", help="numbers of layers")
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--nsamples", type=int, default=0, help="calibration samples of 512 tokens; 0: plain rounding")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--python", default=sys.executable)
    arguments = parser.parse_args()
    for layers in map(int, arguments.layers.split(",")):
        source = arguments.folder / f"random-llama-{layers}"
        if not (source / "config.json").exists():
            make(source, layers, arguments.shards, arguments.hidden)
        given = json.dumps(options(arguments.nsamples))
        command = [arguments.python, "-c", WORKER, str(source), str(arguments.folder / "out"), given]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"{layers} layers: {done.stdout.splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
