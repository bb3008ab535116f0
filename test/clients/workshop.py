"""Makes what the clients read, and what their answers are compared with: a small trained model is quantized once per
scheme, every format is written from that work folder, and a dense float32 model with the dequantized weights (and
quantized inputs, where the scheme has them) is the reference.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matrix import SCHEMES, Row

from auto_round import AutoRound
from auto_round.compressors.again import export_work
from auto_round.data_type import data_type
from auto_round.data_type.base import QuantizedTensor
from auto_round.eval.divergence import divergence
from auto_round.eval.perplexity import perplexity, read_windows
from auto_round.plan import LayerPlan

CANDIDATES, PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 4, 48, 16


@dataclass(frozen=True)
class Reference:
    """Prompts, their logits [prompts · positions, vocabulary] in float32, and the greedy tokens after each.

    noise: relative error of the same model's logits in bfloat16.
    """

    prompts: list[list[int]]
    scores: np.ndarray
    tokens: list[list[int]]
    noise: float


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """‖got − want‖ / ‖want‖, each row less its mean: adding a number to a row's logits changes no probability, and
    log-probabilities are logits with such a number added.
    """
    got, want = (scores.astype(np.float64) for scores in (got, want))
    got, want = (scores - scores.mean(-1, keepdims=True) for scores in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def greedy(model: torch.nn.Module, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [prompts, NEW_TOKENS], and by how much the likeliest led at the closest of these choices."""
    ids, past, tokens, leads = prompts, None, [], []
    for _ in range(NEW_TOKENS):
        found = model(ids, past_key_values=past, use_cache=True)
        past = found.past_key_values
        best = found.logits[:, -1].topk(2)
        tokens.append(best.indices[:, :1])
        leads.append(best.values[:, 0] - best.values[:, 1])
        ids = tokens[-1]
    return torch.cat(tokens, dim=1), torch.stack(leads).amin(0)


class Workshop:
    """Artifacts and references of one model, kept in a folder and made when they are asked for.

    settings: further arguments of AutoRound (iters, dataset, nsamples, seqlen).
    """

    def __init__(self, model: Path, folder: Path, text: Path | None = None, **settings: Any):
        self.model, self.folder, self.text = model, folder, text
        self.settings = {"iters": 0, "nsamples": 32, "seqlen": 256, "device_map": "cpu", "show_progress": False}
        self.settings |= settings
        self.work = cache(self._work)
        self.reference = cache(self._reference)
        self.artifact = cache(self._artifact)
        self.quality = cache(self._quality)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def original(self) -> torch.nn.Module:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    def _work(self, scheme: str) -> tuple[Path, dict[str, tuple[QuantizedTensor, LayerPlan]]]:
        """The work folder of a scheme, and every quantized layer with its plan."""
        run = AutoRound(str(self.model), **{**self.settings, **SCHEMES[scheme]})
        store = run.run(self.folder / "work" / _as_folder(scheme))
        layers: dict[str, tuple[QuantizedTensor, LayerPlan]] = {}
        for part in run.plan.parts:
            plans = run.plan.quantized(part)
            layers |= {name: (tensor, plans[name]) for name, tensor in store.load(part, plans).tensors.items()}
        store.close()
        return store.folder, layers

    def _artifact(self, row: Row) -> Path:
        """The folder of a row's export, or its file where the format is one file."""
        target = self.folder / "out" / _as_folder(row.name)
        shutil.rmtree(target, ignore_errors=True)
        folder = export_work(self.work(row.scheme)[0], row.format, target)
        return next(Path(folder).glob("*.gguf"), Path(folder))

    def quantized(self, scheme: str, rounds_inputs: bool = True) -> torch.nn.Module:
        """The dense float32 model of a scheme."""
        model = self.original()
        for name, (tensor, plan) in self.work(scheme)[1].items():
            module = model.get_submodule(name)
            module.weight.data.copy_(tensor.dequantize())
            if plan.scheme.act is not None and rounds_inputs:
                module.register_forward_pre_hook(_input_rounder(tensor, plan))
        return model

    @torch.no_grad()
    def _reference(self, scheme: str, rounds_inputs: bool = True) -> Reference:
        """On those prompts, of many, whose continuation is least a matter of rounding: a client that computes in
        bfloat16 may choose otherwise where two tokens are about equally likely, and would be no worse for it.
        """
        model = self.quantized(scheme, rounds_inputs)
        candidates = read_windows(self.tokenizer, self.text, PROMPT_TOKENS, CANDIDATES)
        tokens, leads = greedy(model, candidates)
        chosen = leads.topk(PROMPTS).indices
        ids = candidates[chosen]
        scores = model(ids, use_cache=False).logits.flatten(0, 1).numpy()
        rounded = model.bfloat16()(ids, use_cache=False).logits.flatten(0, 1).float().numpy()
        return Reference(ids.tolist(), scores, tokens[chosen].tolist(), relative_error(rounded, scores))

    def _quality(self, scheme: str, windows: int = 24, window: int = 256) -> dict[str, float]:
        """Perplexity, and KL divergence from the original in nats per token, on held-out text."""
        ids = read_windows(self.tokenizer, self.text, window, windows)
        model = self.quantized(scheme)
        return {"perplexity": perplexity(model, ids), "kl": divergence(model, self.original(), ids).kl}


def _as_folder(name: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in name)


def _input_rounder(tensor: QuantizedTensor, plan: LayerPlan) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A forward hook that rounds what enters a layer."""
    act = plan.scheme.act
    family = data_type(act.data_type)

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (family.quantize_input(inputs[0], act, tensor.input_scale), *inputs[1:])

    return hook
