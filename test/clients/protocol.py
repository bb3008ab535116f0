"""What a client program and the tests say to each other. Each `run_<client>.py` runs in the environment of its engine,
where neither auto_round nor pytest need to be, so this file needs the standard library and NumPy only.

A request is a JSON file {artifact, prompts, new_tokens, option, answer}; the answer is written to the path of that name
as {tokens, versions, layers} beside an .npy of the scores, [prompts · positions, vocabulary].
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """A loaded model."""

    def scores(self, prompt: Sequence[int]) -> np.ndarray:
        """Logits or log-probabilities [len(prompt), vocabulary] of what follows each token of the prompt."""

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The likeliest tokens one after another, never stopping early."""

    def layers(self) -> dict[str, int]:
        """How many layers of each kind compute the model: the engine's own class or kernel names."""


def serve(load: Callable[[str, str | None], Engine], *packages: str) -> None:
    """Answer the request named on the command line; load is called as (artifact, option)."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    engine = load(request["artifact"], request["option"])
    prompts = request["prompts"]
    answer = Path(request["answer"])
    np.save(answer.with_suffix(".npy"), np.concatenate([engine.scores(prompt) for prompt in prompts]))
    result: dict[str, Any] = {
        "tokens": [engine.greedy(prompt, request["new_tokens"]) for prompt in prompts],
        "versions": {name: found for name in packages if (found := _version(name))},
        "layers": engine.layers(),
    }
    answer.write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # engines with threads of their own may hang in their destructors, and everything is written


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
