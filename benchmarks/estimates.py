"""Estimates beside what runs really took: memory and time of small models in four recipes.

Every run is a fresh process that quantizes, saves and verifies; its report holds the estimate made before the start.
The same estimate is made once more by `auto-round plan` in a process of its own, from headers alone. The error is
estimate over measurement, less one. Measured time is that of `quantize_and_save` without estimating. Speed is measured
and compared in processor time, on one thread, so that a machine may do other things, too; wall time is shown beside it.

    python benchmarks/estimates.py --folder DIR [--model FOLDER …] [--sizes 512x4,1024x2,512x4x32] [--python PYTHON]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from streaming import config, shapes

RECIPES: dict[str, dict] = {
    "rtn": {"iters": 0, "disable_opt_rtn": True},
    "opt_rtn": {"iters": 0, "nsamples": 16, "seqlen": 512},
    "signround 10": {"iters": 10, "nsamples": 16, "seqlen": 512},
    "adamround 10": {"iters": 10, "nsamples": 16, "seqlen": 512, "enable_adam": True},
}

CLOCK = """
import json, re, sys, time, types
import torch
import auto_round.speed
torch.set_num_threads(1)
auto_round.speed.time = types.SimpleNamespace(perf_counter=time.process_time)
"""
PLAN = CLOCK + "from auto_round.cli.main import main; main(['plan', *sys.argv[1:]])"
WORKER = f"""{CLOCK}
from auto_round import AutoRound
import auto_round.algorithms.tuning as tuning
import auto_round.compressors.base as base
import auto_round.compressors.saving as saving
for module in (tuning, base, saving):
    module.time = types.SimpleNamespace(monotonic=time.process_time)
real, spent = base.check_fits, []
def timed(*given):
    began, worked = time.perf_counter(), time.process_time()
    found = real(*given)
    spent.append((time.perf_counter() - began, time.process_time() - worked))
    return found
base.check_fits = timed
run = AutoRound(sys.argv[1], scheme="W4A16", device_map="cpu", show_progress=False, **json.loads(sys.argv[3]))
began, worked = time.perf_counter(), time.process_time()
run.quantize_and_save(sys.argv[2])
took, worked = time.perf_counter() - began - spent[0][0], time.process_time() - worked - spent[0][1]
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
print(json.dumps({{"seconds": took, "worked": worked, "peak": peak, "estimating": spent[0][0],
                  "times": run.report["times"], "output": run.report["sizes"]["output_bytes"],
                  "estimate": run.report["estimate"]}}))
"""
MIB = 1 << 20
HEAD_DIM, CHOSEN = 64, 4  # channels of a head; experts that a token visits


def make(folder: Path, hidden: int, layers: int, experts: int = 0) -> None:
    """A random Llama in one file; with experts, a Qwen3-MoE."""
    folder.mkdir(parents=True, exist_ok=True)
    made, named = config(layers, hidden), shapes(layers, hidden)
    if experts:
        made, named = with_experts(made, named, experts)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02).bfloat16()
        for name, shape in named.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(made))


def with_experts(made: dict, named: dict[str, tuple[int, ...]], count: int) -> tuple[dict, dict]:
    """The same attention, with experts half as wide as the hidden states in the place of the other layers."""
    hidden = made["hidden_size"]
    wide = hidden // 2
    kept = {name: shape for name, shape in named.items() if ".mlp." not in name}
    for i in range(made["num_hidden_layers"]):
        base = f"model.layers.{i}"
        kept |= {f"{base}.self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
        kept[f"{base}.mlp.gate.weight"] = (count, hidden)
        for expert in range(count):
            own = f"{base}.mlp.experts.{expert}"
            kept |= {f"{own}.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")}
            kept[f"{own}.down_proj.weight"] = (hidden, wide)
    changed = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": HEAD_DIM}
    sizes = {"num_experts": count, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": wide, "norm_topk_prob": True}
    return {**made, **changed, **sizes}, kept


def measure(python: str, model: Path, output: Path, recipe: dict) -> dict:
    """One run in a fresh process, and the plan of the same run in another."""
    shutil.rmtree(output, ignore_errors=True)
    planned = plan(python, model, recipe)
    command = [python, "-c", WORKER, str(model), str(output), json.dumps(recipe)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    shutil.rmtree(output, ignore_errors=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "planned": planned}


def plan(python: str, model: Path, recipe: dict) -> dict:
    command = [python, "-c", PLAN, str(model), "--json", "--device", "cpu"]
    for name, value in recipe.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)["estimate"]


def row(name: str, recipe: str, found: dict) -> str:
    """Memory above the libraries is shown, too: they would hide an error in small models."""
    estimate, planned = found["estimate"], found["planned"]
    total = estimate["ram"]["total"]
    libraries = estimate["ram"]["libraries"]
    above = (total - libraries) / max(found["peak"] - libraries, 1) - 1
    cells = [
        name,
        recipe,
        f"{found['peak'] / MIB:.0f}",
        f"{total / MIB:.0f}",
        f"{total / found['peak'] - 1:+.0%}",
        f"{planned['ram']['total'] / found['peak'] - 1:+.0%}",
        f"{above:+.0%}",
        f"{found['seconds']:.1f}",
        f"{found['worked']:.1f}",
        f"{estimate['total_seconds']:.1f}",
        f"{estimate['total_seconds'] / found['worked'] - 1:+.0%}",
        f"{planned['total_seconds'] / found['worked'] - 1:+.0%}",
        f"{sum(estimate['disk']['output'].values()) / found['output'] - 1:+.1%}",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| model | recipe | peak, MiB | estimate | error | of plan | above libraries "
    "| seconds | of processor | estimate | error | of plan | output |\n|" + "---|" * 13
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where models, results and records go")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a model folder with a tokenizer")
    parser.add_argument(
        "--sizes", default="512x4,1024x2,512x4x32", help="random models: hidden size x layers [x experts]"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer the random models get")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    arguments = parser.parse_args()
    models = list(arguments.model)
    for size in filter(None, arguments.sizes.split(",")):
        numbers = [int(number) for number in size.split("x")]
        folder = arguments.folder / f"{'moe' if len(numbers) == 3 else 'llama'}-{size}"
        if not (folder / "config.json").exists():
            make(folder, *numbers)
        for file in (arguments.tokenizer or arguments.model[0]).glob("tokenizer*"):
            shutil.copy(file, folder)
        models.append(folder)
    print(HEAD)
    with (arguments.folder / "estimates.jsonl").open("a", encoding="utf-8") as records:
        for model in models:
            for recipe in arguments.recipes.split(","):
                found = measure(arguments.python, model, arguments.folder / "out", RECIPES[recipe])
                records.write(json.dumps({"model": model.name, "recipe": recipe, **found}) + "\n")
                records.flush()
                print(row(model.name, recipe, found), flush=True)


if __name__ == "__main__":
    main()
