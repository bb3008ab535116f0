"""mlx-lm as a client, on MLX's CPU build.

The option "float32" makes it compute in that dtype: in bfloat16 the CPU kernels round every partial result, which
moves the logits more than the other clients' bfloat16 does and hides what is stored in the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache
from protocol import serve


class MlxEngine:
    def __init__(self, artifact: str, option: str | None):
        mx.set_default_device(mx.cpu)
        self.model, _ = load(artifact)
        if option is not None:
            self.model.set_dtype(getattr(mx, option))

    def _logits(self, tokens: Sequence[int], cache: Any = None) -> np.ndarray:
        logits = self.model(mx.array([list(tokens)]), cache=cache)[0].astype(mx.float32)
        mx.eval(logits)
        return np.array(logits)

    def scores(self, prompt: Sequence[int]) -> np.ndarray:
        return self._logits(prompt)

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        cache = make_prompt_cache(self.model)
        tokens = [int(self._logits(prompt, cache)[-1].argmax())]
        while len(tokens) < new_tokens:
            tokens.append(int(self._logits(tokens[-1:], cache)[-1].argmax()))
        return tokens

    def layers(self) -> dict[str, int]:
        kinds = (type(module).__name__ for _, module in self.model.named_modules())
        return dict(Counter(kind for kind in kinds if "Linear" in kind or "Embedding" in kind))


if __name__ == "__main__":
    serve(MlxEngine, "mlx", "mlx-lm")
