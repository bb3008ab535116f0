"""llama.cpp as a client of a GGUF file, through llama-cpp-python.

Its CPU kernels round activations to 8 bits in blocks of 32 or 256, so its logits are about 1 % away from those of the
dequantized weights whatever wrote the file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from protocol import serve

CONTEXT = 512


class LlamaCppEngine:
    def __init__(self, artifact: str, option: str | None):
        from llama_cpp import Llama

        self.llama = Llama(model_path=artifact, n_ctx=CONTEXT, n_batch=CONTEXT, logits_all=True, verbose=False)

    def scores(self, prompt: Sequence[int]) -> np.ndarray:
        self.llama.reset()
        self.llama.eval(list(prompt))
        return np.array(self.llama.scores[: len(prompt)], np.float32)

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        tokens = [int(self.scores(prompt)[-1].argmax())]
        while len(tokens) < new_tokens:
            self.llama.eval(tokens[-1:])
            tokens.append(int(self.llama.scores[self.llama.n_tokens - 1].argmax()))
        return tokens

    def layers(self) -> dict[str, int]:
        return {}  # the library does not show them


if __name__ == "__main__":
    serve(LlamaCppEngine, "llama-cpp-python")
