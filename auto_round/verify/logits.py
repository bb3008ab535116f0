"""The quantized model run on its own weights, and set beside what Transformers makes of the written folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from auto_round.algorithms.base import put_weights
from auto_round.modeling.streaming import StreamedModel
from auto_round.plan import ModelPlan
from auto_round.store import Store
from auto_round.tied import put_tied, quantized_outside
from auto_round.wrapper import quantized_inputs

RELOAD_TOLERANCE = 2e-2  # relative difference of logits; the dequantized weights are compared bit for bit

MASKED = 1e4  # logits beyond this are masks that a model puts over some columns


@torch.no_grad()
def artifact_logits(
    streamed: StreamedModel,
    plan: ModelPlan,
    store: Store,
    batch,
    amp,
    rounds: Callable[[str], bool] = lambda name: True,
) -> torch.Tensor:
    """Logits of the streamed model on the quantized weights, block by block; `codes_problem` ties them to the file.

    rounds: whether the inputs of a layer, whose scheme says so, are rounded.
    """
    from auto_round.calibration.native import no_cache, run_logits

    rounding = {name: layer for name, layer in plan.quantized().items() if layer.scheme.act and rounds(name)}

    def put(block: str, module: torch.nn.Module) -> None:
        if block in plan.parts:
            layers = plan.quantized(block)
            put_weights(module, block, store.load(block, layers).tensors, layers)
        put_tied(streamed.model, plan, store, block)

    scales = {
        name: tensor.input_scale
        for part in (plan.parts if rounding else ())
        for name, tensor in store.load(part, plan.quantized(part)).tensors.items()
    }
    streaming = streamed.streaming(lambda block, module: put(block, module))
    inputs = quantized_inputs(streamed.model, rounding, scales)
    with quantized_outside(streamed.model, plan, store), streaming as model, no_cache(model), inputs, amp():
        return run_logits(model, batch, streamed.device)


@torch.no_grad()
def logit_distance(original: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """(mean KL(original ‖ other) in nats per token, top-1 agreement) of logits [batch, length, vocabulary]."""
    kl, agree, tokens = 0.0, 0, 0
    for one, two in zip(original.flatten(0, 1).split(64), other.flatten(0, 1).split(64), strict=True):
        p, q = one.float().log_softmax(-1), two.float().log_softmax(-1)
        kl += (p.exp() * (p - q)).sum(dtype=torch.float64).item()
        agree += int((one.argmax(-1) == two.argmax(-1)).sum())
        tokens += one.shape[0]
    return kl / tokens, agree / tokens


@torch.no_grad()
def logit_error(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """‖got - want‖ / ‖want‖ of logits: over all tokens, and the bound that three quarters of the tokens keep.

    A few rows at a time: a vocabulary can be large.
    """
    squares, wanted = [], []
    for one, two in zip(got.flatten(0, -2).split(64), want.flatten(0, -2).split(64), strict=True):
        real = two.abs() < MASKED
        squares.append(torch.where(real, one.float() - two.float(), 0).square().sum(-1))
        wanted.append(torch.where(real, two.float(), 0).square().sum(-1))
    difference, norm = torch.cat(squares), torch.cat(wanted).clamp(min=1e-30)
    per_token = (difference / norm).sqrt()
    return (difference.sum() / norm.sum()).sqrt().item(), per_token.nan_to_num(1e9).quantile(0.75).item()


@torch.no_grad()
def reload_problem(
    folder: Path,
    batch,
    expected: torch.Tensor,
    trust_remote_code: bool,
    routed: bool = False,
    tolerance: float = RELOAD_TOLERANCE,
    amp: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> str | None:
    """Transformers loads the folder, and computes the logits of the quantized model.

    tolerance: relative difference that rounding may bring. amp: the context in which `expected` was computed.
    routed: tokens choose among experts. A rounding error can
    send a few of them elsewhere, so three quarters of the tokens must agree instead of all of them; a wrong model is
    wrong nearly everywhere.
    """
    from auto_round.calibration.native import no_cache, run_logits
    from auto_round.inference.load import load_model

    model = load_model(folder, trust_remote_code)
    with no_cache(model), amp():
        got = run_logits(model, batch, "cpu")
    overall, most = logit_error(got, expected)
    if not (overall <= tolerance or (routed and most <= tolerance)):
        return f"logits of the model loaded by Transformers are {overall:.2%} away from the quantized model's"
    return None
