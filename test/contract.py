"""What every model must pass: blocks found, calibration, quantization of its blocks, saving, reloading, logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import save_tiny, token_ids
from transformers import AutoModelForCausalLM

from auto_round import AutoRound
from auto_round.utils import get_block_names


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


def check_model(
    model: Any,
    folder: Path,
    device: str,
    blocks: list[list[str]],
    layers: int,
    scheme: str = "W4A16G32",
    iters: int = 2,
) -> Any:
    """Run the whole contract on a tiny random model; returns the reloaded quantized model."""
    assert get_block_names(model) == blocks
    source = save_tiny(model, folder / "source")
    run = AutoRound(
        str(source),
        scheme=scheme,
        dataset=token_ids(),
        nsamples=8,
        seqlen=32,
        batch_size=4,
        iters=iters,
        device_map=device,
        show_progress=False,
    )
    assert sum(plan.is_quantized for plan in run.plan.layers.values()) == layers
    run.calib()
    run._quantize_blocks()
    for block in run.plan.block_names:
        assert run._store.has(block)

    _, out = run.quantize_and_save(folder / "out")
    assert all(check["passed"] for check in run.report["checks"]), run.report["checks"]
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").to(device)
    batch = torch.cat(token_ids(2, 24, seed=1)).to(device)
    rounded = _rounded(source, scheme, folder).to(device)
    with torch.no_grad():
        want = model.to(device)(batch).logits
        error, bound = relative(loaded(batch).logits, want), relative(rounded(batch).logits, want)
    assert error <= 2.5 * bound + 0.02, (error, bound)
    return loaded


def _rounded(source: Path, scheme: str, folder: Path) -> Any:
    """The same model rounded to nearest, dequantized: what a correct artifact must not be much worse than."""
    run = AutoRound(str(source), scheme=scheme, iters=0, disable_opt_rtn=True, device_map="cpu", show_progress=False)
    _, out = run.quantize_and_save(folder / "rtn", format="fake")
    return AutoModelForCausalLM.from_pretrained(out, dtype="auto")
