"""How each implementation is told to quantize: one function each, run by the interpreter that has it.

The module level needs the standard library only, since these interpreters share nothing else. Every function takes a
job (model, calib, row, recipe, seed, nsamples, seqlen, output) and leaves a saved model in its output folder.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

Record = dict[str, Any]

RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"iters": 0, "disable_opt_rtn": True},
    "opt_rtn": {"iters": 0},
    "light": {"iters": 50, "lr": 5e-3},
    "default": {"iters": 200},
    "best": {"iters": 1000},
}
BATCH_SIZE = 8
FLOATS = ("MXFP4", "NVFP4")


def integer_row(row: str) -> tuple[int, int] | None:
    """Bits and group size of a row such as ``W4g128``; None for rows that are named otherwise."""
    match = re.fullmatch(r"W(\d+)g(-?\d+)", row)
    return match and (int(match[1]), int(match[2]))


def parse_row(row: str) -> dict[str, Any]:
    """Turn a row such as ``W4g128``, ``auto3.0``, ``MXFP4`` or ``Q4_K_M`` into the scheme arguments of `AutoRound`."""
    if row.startswith("auto"):
        return {"schemes": "W2A16,W4A16,W8A16", "bits": float(row.removeprefix("auto"))}
    if numbers := integer_row(row):
        return {"scheme": f"W{numbers[0]}A16", "group_size": numbers[1]}
    if row in FLOATS:
        return {"scheme": row}
    if re.fullmatch(r"Q\d_K(_[SML])?", row):
        return {"scheme": f"GGUF:{row}"}
    raise ValueError(f"a row looks like W4g128, auto3.0, {', '.join(FLOATS)} or Q4_K_M, not {row!r}")


def auto_round(job: Record) -> None:
    """Any implementation of the `AutoRound` API, called alike. job["arguments"]: what differs from the recipe."""
    from auto_round import AutoRound

    scheme = parse_row(job["row"])
    compressor = AutoRound(
        job["model"],
        **scheme,
        **{**RECIPES[job["recipe"]], **job.get("arguments", {})},
        dataset=job["calib"],
        nsamples=job["nsamples"],
        seqlen=job["seqlen"],
        batch_size=BATCH_SIZE,
        seed=job["seed"],
        device_map="cpu",
        enable_torch_compile=False,
    )
    name = scheme.get("scheme", "").lower()
    compressor.quantize_and_save(job["output"], format=name if name.startswith("gguf:") else "auto_round")


def samples(job: Record) -> list[list[int]]:
    """Token ids of the first records, in a seeded order, that fill a sample, as `AutoRound` chooses them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    texts = [json.loads(line)["text"] for line in Path(job["calib"]).read_text(encoding="utf-8").splitlines()]
    random.Random(job["seed"]).shuffle(texts)
    cut = (tokenizer(text, add_special_tokens=False)["input_ids"][: job["seqlen"]] for text in texts)
    return [ids for ids in cut if len(ids) == job["seqlen"]][: job["nsamples"]]


def gptqmodel(job: Record) -> None:
    """GPTQ by GPTQModel with its own settings."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses to start with the one that it takes on two cores
    from gptqmodel import GPTQModel, QuantizeConfig

    numbers = integer_row(job["row"])
    if numbers is None or job["recipe"] != "gptq":
        raise ValueError(f"GPTQModel is asked for gptq and integers only, not for {job['recipe']} of {job['row']}")
    model = GPTQModel.load(job["model"], QuantizeConfig(bits=numbers[0], group_size=numbers[1]), device="cpu")
    data = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples(job)]
    model.quantize(data, batch_size=BATCH_SIZE)
    model.save(job["output"])


def llm_compressor(job: Record) -> None:
    """GPTQ or AWQ by llm-compressor with its own settings, symmetric integers in groups."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    numbers = integer_row(job["row"])
    if numbers is None:
        raise ValueError(f"llm-compressor is asked for integers only, not for {job['row']}")
    weights = {"num_bits": numbers[0], "type": "int", "symmetric": True, "strategy": "group", "group_size": numbers[1]}
    layers = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    recipes = {
        "gptq": lambda: [GPTQModifier(**layers)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**layers)],
    }
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda tensor: tensor  # AWQ pins memory even where nothing could read it
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    ids = samples(job)
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(job["model"]),
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        recipe=recipes[job["recipe"]](),
        batch_size=BATCH_SIZE,
        max_seq_length=job["seqlen"],
        num_calibration_samples=len(ids),
    )
    model.save_pretrained(job["output"], save_compressed=True)


def llama_cpp(job: Record) -> None:
    """llama.cpp's own quantizer, with and without an importance matrix; saves what its numbers stand for."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from gguf_quality import bench_for

    bench = bench_for(job)
    importance = {"plain": dict, "imatrix": bench.block_importance}[job["recipe"]]()
    model, _ = bench.quantized(job["row"], importance)
    model.save_pretrained(job["output"])


QUANTIZERS = {
    "auto_round": auto_round,
    "gptqmodel": gptqmodel,
    "llmcompressor": llm_compressor,
    "gguf": llama_cpp,
}
"""By the package whose import is not counted."""
