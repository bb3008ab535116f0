"""A large checkpoint quantized under a hard limit of memory.

Makes a random Llama with the layers of Llama-3-8B (a small vocabulary; a shard at a time, so this takes little memory)
and quantizes it in a fresh process that the system lets have no more than the limit. The limit is a memory control
group where one can be made: it counts the page cache, too, which the system takes back as it needs. Elsewhere it is the
process's data (RLIMIT_DATA), which does not count files. The process is killed, or its allocations fail, if it wants
more: whatever is printed has stayed within the limit.

    python benchmarks/memory.py --folder DIR --layers 38 --limit 2GiB --iters 0
    python benchmarks/memory.py --folder DIR --layers 38 --limit 4GiB --iters 2 [--nsamples 4 --seqlen 256]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from auto_round.formats.writer import parse_size

HIDDEN, INTERMEDIATE, HEADS, KEYS, HEAD = 4096, 14336, 32, 8, 128
GROUPS = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.stat"),
          ("/sys/fs/cgroup", "memory.max", "memory.peak", "memory.stat"))  # fmt: skip

WORKER = """
import json, re, sys
import torch
torch.set_num_threads(int(sys.argv[4]))
from auto_round import AutoRound
options = json.loads(sys.argv[3])
run = AutoRound(sys.argv[1], scheme="W4A16", device_map="cpu", show_progress=False, **options)
_, folder = run.quantize_and_save(sys.argv[2], force=True)
status = open("/proc/self/status").read()
peak = {name: int(re.search(name + r":\\s+(\\d+)", status)[1]) >> 10 for name in ("VmHWM", "RssAnon", "RssFile")}
report = run.report
print(json.dumps({"peak_mib": peak, "estimate_mib": report["estimate"]["ram"]["total"] >> 20,
                  "estimate": report["estimate"]["ram"], "working": report["working"], "times": report["times"],
                  "kl": report["kl"], "checks": len(report["checks"]), "warnings": report["warnings"],
                  "output_bytes": report["sizes"]["output_bytes"]}))
"""


def shapes(layer: int) -> dict[str, tuple[int, ...]]:
    base = f"model.layers.{layer}"
    wide, narrow = HEADS * HEAD, KEYS * HEAD
    found = {f"{base}.self_attn.{name}_proj.weight": (out, HIDDEN)
             for name, out in (("q", wide), ("k", narrow), ("v", narrow))}  # fmt: skip
    found[f"{base}.self_attn.o_proj.weight"] = (HIDDEN, wide)
    found |= {f"{base}.mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
    found[f"{base}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return found | {f"{base}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}


def config(layers: int, vocabulary: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS, "head_dim": HEAD, "vocab_size": vocabulary, "max_position_embeddings": 8192,
        "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def make(folder: Path, layers: int, vocabulary: int) -> int:
    """Write the checkpoint, a layer to a shard; returns its bytes. Needs the memory of one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {"model.embed_tokens.weight": (vocabulary, HIDDEN), "lm_head.weight": (vocabulary, HIDDEN)}
    groups = [{**table, "model.norm.weight": (HIDDEN,)}, *(shapes(layer) for layer in range(layers))]
    generator, weight_map, total = torch.Generator().manual_seed(0), {}, 0
    drawn = (torch.randn((1 << 24) + 7, generator=generator) * 0.02).bfloat16()
    for index, group in enumerate(groups):
        file = f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for number, (name, shape) in enumerate(group.items()):
            count = torch.Size(shape).numel()
            values = drawn.roll(7919 * (1 + index * 16 + number)).repeat(-(-count // drawn.numel()))[:count]
            tensors[name] = torch.ones(shape, dtype=drawn.dtype) if len(shape) == 1 else values.view(shape).clone()
            total += 2 * count
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json))
    (folder / "config.json").write_text(json.dumps(config(layers, vocabulary)))
    return total


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[tuple[Path | None, str, str]]:
    """(an own group with that limit or None, what limits, the file that tells the most that was used)."""
    for root, limiting, telling, _ in GROUPS:
        group = Path(root) / f"auto_round_{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limiting).write_text(str(limit))
            yield group, f"control group ({limiting})", telling
            return
        except OSError:
            continue
        finally:
            group.rmdir()
    yield None, "RLIMIT_DATA", ""


def run(command: list[str], limit: int) -> dict:
    with control_group(limit) as (group, how, telling):

        def confine() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))
            else:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

        began = time.monotonic()
        done = subprocess.run(command, preexec_fn=confine, capture_output=True, text=True)
        found = {"limit": limit, "limited_by": how, "seconds": round(time.monotonic() - began, 1)}
        if group is not None:
            found["group_peak_mib"] = int((group / telling).read_text()) >> 20
    if done.returncode:
        return {**found, "failed": done.returncode, "error": done.stderr[-2000:]}
    return {**found, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint and the result go")
    parser.add_argument("--layers", type=int, default=38, help="436 MB each: 38 make 16 GiB")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--limit", default="2GiB")
    parser.add_argument("--iters", type=int, default=0, help="0 rounds to nearest, without calibration")
    parser.add_argument("--nsamples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint and the result")
    parser.add_argument("--python", default=sys.executable)
    given = parser.parse_args()
    source, output = given.folder / f"llama-{given.layers}", given.folder / "out"
    nbytes = 0 if (source / "config.json").exists() else make(source, given.layers, given.vocabulary)
    print(f"{source}: {sum(file.stat().st_size for file in source.iterdir()) / (1 << 30):.2f} GiB", flush=True)
    shutil.rmtree(output, ignore_errors=True)
    options: dict = {"iters": given.iters, "max_memory": given.limit}
    if given.iters:
        ids = torch.randint(
            given.vocabulary, (given.nsamples + 4, given.seqlen), generator=torch.Generator().manual_seed(1)
        )
        options |= {"dataset": ids.tolist(), "nsamples": given.nsamples, "seqlen": given.seqlen, "batch_size": 2}
    else:
        options |= {"disable_opt_rtn": True}
    command = [given.python, "-c", WORKER, str(source), str(output), json.dumps(options), str(given.threads)]
    print(json.dumps(run(command, parse_size(given.limit)), indent=1))
    if not given.keep:
        shutil.rmtree(output, ignore_errors=True)
        if nbytes:
            shutil.rmtree(source)


if __name__ == "__main__":
    main()
