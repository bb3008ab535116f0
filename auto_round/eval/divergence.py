"""How far a quantized model's predictions are from those of its original.

Perplexity forgives errors that cancel; the KL divergence between the two models' predictions and their top-1
agreement do not, and need far less text to tell two quantizations apart. `compare` is the whole of a built-in
evaluation: it loads the folders, measures both models on held-out text and returns one value.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from auto_round.eval.harness import run_tasks
from auto_round.eval.perplexity import (
    EvaluationError,
    EvaluationFileNotFoundError,
    batch_logits,
    check_windows,
    evaluating,
    exp_mean,
    log_probs,
    perplexity,
    piece_nll,
    pieces,
    read_windows,
)
from auto_round.inference.load import load_model
from auto_round.utils.model import load_tokenizer


@dataclass(frozen=True)
class Divergence:
    """Mean over `tokens` predictions.

    Attributes:
        kl: KL(reference || model) per token, in nats.
        top1: share of predictions whose most likely token is the same, 0 to 1.
    """

    kl: float
    top1: float
    tokens: int


@dataclass(frozen=True)
class EvalResult:
    """What `compare` measured; the fields about the original are None when there was none to compare with."""

    model: str
    against: str | None
    perplexity: float
    tokens: int
    seqlen: int
    seconds: float
    reference_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str]]:
        """(label, value) pairs for a table."""
        rows = [("model", self.model)]
        if self.against is not None:
            rows.append(("original", self.against))
        rows.append(("perplexity", f"{self.perplexity:.4f}"))
        if self.reference_perplexity is not None and self.kl is not None and self.top1 is not None:
            rows += [
                ("perplexity of the original", f"{self.reference_perplexity:.4f}"),
                ("KL divergence (nats per token)", f"{self.kl:.6f}"),
                ("top-1 agreement", f"{self.top1:.2%}"),
            ]
        rows += [(f"{task} {metric}", f"{v:.4f}") for task, found in self.tasks.items() for metric, v in found.items()]
        tokens = f"{self.tokens} in windows of {self.seqlen}"
        return [*rows, ("predicted tokens", tokens), ("seconds", f"{self.seconds:.1f}")]


@dataclass
class _Totals:
    """Sums over all predictions of one pass over the windows."""

    tokens: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def divergence(self) -> Divergence:
        return Divergence(self.kl / self.tokens, self.agreed / self.tokens, self.tokens)

    def figures(self) -> dict[str, float]:
        """The fields of an EvalResult that come of comparing two models."""
        mean = self.divergence()
        return {
            "perplexity": exp_mean(self.nll, self.tokens),
            "reference_perplexity": exp_mean(self.reference_nll, self.tokens),
            "kl": mean.kl,
            "top1": mean.top1,
        }


def divergence(
    model: torch.nn.Module, reference: torch.nn.Module, windows: torch.Tensor, batch_size: int = 4
) -> Divergence:
    """Compare the predictions of two models on `windows` [n, L], at all positions but the last of each window.

    Probabilities are computed in float32; only one batch of logits of each model exists at a time.

    Raises:
        EvaluationError: logits that are not finite, or models with different vocabularies.
    """
    return _measure_both(model, reference, windows, batch_size).divergence()


@torch.no_grad()
def _measure_both(
    model: torch.nn.Module, reference: torch.nn.Module, windows: torch.Tensor, batch_size: int
) -> _Totals:
    check_windows(windows, batch_size)
    totals = _Totals()
    with evaluating(model, reference):
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            logits = batch_logits(model, batch)
            reference_logits = batch_logits(reference, batch)
            if logits.shape != reference_logits.shape:
                raise EvaluationError(
                    f"The models cannot be compared: one knows {logits.shape[-1]} tokens, "
                    f"the other {reference_logits.shape[-1]}; give the original of this very model."
                )
            _add_batch(totals, logits, reference_logits, batch, start)
    return totals


def _add_batch(
    totals: _Totals, logits: torch.Tensor, reference_logits: torch.Tensor, batch: torch.Tensor, first: int
) -> None:
    """Add one batch: logits [B, L-1, V] of both models for ids [B, L]."""
    for row, part in pieces(logits):
        logp = log_probs(logits[row, part], first + row)
        reference_logp = log_probs(reference_logits[row, part], first + row, "original model").to(logp.device)
        targets = batch[row, 1:][part]
        totals.nll += piece_nll(logp, targets)
        totals.reference_nll += piece_nll(reference_logp, targets)
        totals.agreed += int((logp.argmax(-1) == reference_logp.argmax(-1)).sum())
        # Summed over the vocabulary on the device, over the tokens in float64: not every device has float64.
        per_token = (reference_logp.exp() * (reference_logp - logp)).sum(-1)
        totals.kl += float(per_token.cpu().double().sum())
        totals.tokens += len(targets)


def compare(
    model_dir: str | Path,
    against: str | Path | None = None,
    text: str | Path | None = None,
    windows: int = 120,
    seqlen: int = 512,
    device: str = "cpu",
    trust_remote_code: bool = False,
    tasks: list[str] | None = None,
    batch_size: int = 4,
    limit: float | None = None,
    num_fewshot: int | None = None,
) -> EvalResult:
    """Evaluate a model folder, and set it beside its original where `against` names one.

    Args:
        model_dir: a folder that Transformers loads; a quantized one through Transformers' quantizer.
        against: the folder of the original; both models are in memory at once.
        text: UTF-8 text with lines `<|doc|>` between documents; None for the held-out text of the package.
        seqlen: length of a window; a model with a shorter context gets windows of that.
        tasks: lm-eval tasks to run on `model_dir` as well (needs the extra `[eval]`).
        limit: how many items of each task, or which share of them; `num_fewshot` is for the tasks too.

    Raises:
        EvaluationError: the model cannot be loaded or gives logits that are not finite.
        EvaluationFileNotFoundError: a folder or the text does not exist.
    """
    started = time.monotonic()
    _check_folders(model_dir, against)
    model = _load(load_model, model_dir, trust_remote_code, device_map=device)
    tokenizer = _load(load_tokenizer, model_dir, trust_remote_code)
    if tokenizer is None:
        raise EvaluationError(f"{model_dir} has no tokenizer; put the original's tokenizer files into the folder.")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ids = read_windows(tokenizer, text, min(seqlen, context or seqlen), windows)
    if against is None:
        figures: dict[str, Any] = {"perplexity": perplexity(model, ids, batch_size)}
    else:
        reference = _load(load_model, against, trust_remote_code, device_map=device)
        figures = _measure_both(model, reference, ids, batch_size).figures()
    model = reference = None  # lm-eval loads its own
    found = run_tasks(model_dir, tasks, batch_size, limit, num_fewshot, device, trust_remote_code) if tasks else {}
    return EvalResult(
        model=str(model_dir),
        against=None if against is None else str(against),
        tokens=ids.shape[0] * (ids.shape[1] - 1),
        seqlen=ids.shape[1],
        seconds=time.monotonic() - started,
        tasks=found,
        **figures,
    )


def _check_folders(*folders: str | Path | None) -> None:
    for folder in folders:
        if folder is not None and not Path(folder).is_dir():
            raise EvaluationFileNotFoundError(f"The model folder {folder} does not exist; check the path.")


def _load(loader: Callable[..., Any], folder: str | Path, trust_remote_code: bool, **options: Any) -> Any:
    """`loader` on the folder, with an error that names it."""
    try:
        return loader(Path(folder), trust_remote_code, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        what = "tokenizer" if loader is load_tokenizer else "model"
        raise EvaluationError(f"The {what} in {folder} cannot be loaded: {reason}") from error
