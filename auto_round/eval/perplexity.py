"""Perplexity of a causal language model on held-out text.

The text is cut into non-overlapping windows of equal length, spread evenly over all of it, and the model predicts
every token of a window but the first. Nothing is padded and no context slides, so the figure of one model can be set
beside that of another with the same tokenizer. Other measures of the same windows are in `divergence.py`.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

HELDOUT_FILE = Path(__file__).resolve().parent.parent / "assets" / "heldout.txt"
DOCUMENT_LINE = "<|doc|>"
SHORTEST_WINDOW = 16

_CHUNK_ELEMENTS = 2**24  # float32 working memory for one piece of logits: 64 MiB a copy


class EvaluationError(ValueError):
    """A model or a text cannot be evaluated."""


class EvaluationFileNotFoundError(FileNotFoundError):
    """A text or a model folder does not exist."""


def read_windows(
    tokenizer: Any, text_path: str | Path | None = None, seqlen: int = 512, windows: int = 120
) -> torch.Tensor:
    """Token windows of a text, int64 [n, seqlen], n at most `windows`.

    Lines `<|doc|>` separate the documents, and each is closed by the tokenizer's end-of-text token. A text shorter
    than one window gives one shorter window.

    Args:
        text_path: a UTF-8 file; None for the held-out text that comes with the package.

    Raises:
        EvaluationFileNotFoundError: the file does not exist.
        EvaluationError: the file is not UTF-8, or gives fewer than 16 tokens.
    """
    if seqlen < 2 or windows < 1:
        raise EvaluationError(f"seqlen must be at least 2 and windows at least 1, not {seqlen} and {windows}.")
    path = HELDOUT_FILE if text_path is None else Path(text_path)
    ids: list[int] = []
    eos = getattr(tokenizer, "eos_token_id", None)
    for document in _split_documents(_read_text(path)):
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids += [] if eos is None else [eos]
    if len(ids) < SHORTEST_WINDOW:
        raise EvaluationError(f"The text {path} gives {len(ids)} tokens; give at least {SHORTEST_WINDOW}.")
    seqlen = min(seqlen, len(ids))
    total = len(ids) // seqlen
    count = min(windows, total)
    starts = [i * total // count * seqlen for i in range(count)]
    return torch.tensor([ids[start : start + seqlen] for start in starts], dtype=torch.int64)


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise EvaluationFileNotFoundError(f"The evaluation text {path} does not exist; check the path.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"The evaluation text {path} is not UTF-8 ({error.reason} at {error.start}).") from error


def _split_documents(text: str) -> list[str]:
    documents: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip() == DOCUMENT_LINE:
            documents.append([])
        else:
            documents[-1].append(line)
    joined = ("\n".join(lines).strip("\r\n") for lines in documents)
    return [document for document in joined if document.strip()]


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor, batch_size: int = 4) -> float:
    """exp of the mean negative log-likelihood of every token of `windows` [n, L] but the first of each.

    Probabilities are computed in float32, whatever the model's dtype; a value too large for a float is inf.

    Raises:
        EvaluationError: the logits hold NaN or infinity.
    """
    check_windows(windows, batch_size)
    nll = 0.0
    with evaluating(model):
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            logits = batch_logits(model, batch)
            for row, part in pieces(logits):
                nll += piece_nll(log_probs(logits[row, part], start + row), batch[row, 1:][part])
    return exp_mean(nll, windows.shape[0] * (windows.shape[1] - 1))


def check_windows(windows: torch.Tensor, batch_size: int) -> None:
    """Refuse windows that hold nothing to predict."""
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise EvaluationError(f"Evaluation windows must be [n, L] with L above 1, not {list(windows.shape)}.")
    if batch_size < 1:
        raise EvaluationError(f"batch_size must be at least 1, not {batch_size}.")


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """Put models in eval mode and give each module its mode back afterwards."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def batch_logits(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Logits for the next token at all positions but the last: [B, L] -> [B, L-1, V], in the model's dtype."""
    parameters = inspect.signature(model.forward).parameters
    takes_cache = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    options = {"use_cache": False} if takes_cache else {}
    return model(input_ids=batch.to(_input_device(model)), **options).logits[:, :-1]


def _input_device(model: torch.nn.Module) -> torch.device:
    """Where the model wants its ids; with the layers on several devices, that is where the embedding lies."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    for module in (embedding, model):
        for parameter in module.parameters() if module is not None else ():
            if parameter.device.type != "meta":
                return parameter.device
    return torch.device("cpu")


def pieces(logits: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """(row, positions) that together cover [B, L, V] in pieces small enough to be turned into float32."""
    step = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    for row in range(logits.shape[0]):
        for start in range(0, logits.shape[1], step):
            yield row, slice(start, start + step)


def log_probs(logits: torch.Tensor, window: int, name: str = "model") -> torch.Tensor:
    """float32 log-probabilities [T, V] of one piece of logits; `window` and `name` are for the error message."""
    logits = logits.float()
    if not bool(torch.isfinite(logits).all()):
        raise EvaluationError(
            f"The {name} gives logits that are not finite (NaN or infinity) in window {window}; "
            "its weights are damaged, or its dtype overflows: try float32 or bfloat16."
        )
    return torch.log_softmax(logits, dim=-1)


def piece_nll(logp: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum of the negative log-likelihoods of `targets` [T] under `logp` [T, V]."""
    if int(targets.max()) >= logp.shape[-1]:
        raise EvaluationError(
            f"The text holds the token id {int(targets.max())} and the model knows {logp.shape[-1]} tokens; "
            "the tokenizer belongs to another model."
        )
    picked = logp.gather(-1, targets.to(logp.device)[:, None])
    return -float(picked.cpu().double().sum())


def exp_mean(total: float, count: int) -> float:
    """exp(total / count), inf where that is too large: a ruined model must give a figure, not a crash."""
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf
