"""Transformers as a client; it reads our own formats through auto_round, and GGUF files by their name.

The option is a dtype, "auto" by default, or a dtype and a backend of `AutoRoundConfig`: "bfloat16,torch".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import serve
from transformers import AutoModelForCausalLM


class TransformersEngine:
    def __init__(self, artifact: str, option: str | None):
        dtype, _, backend = (option or "auto").partition(",")
        found: dict[str, Any] = {"dtype": dtype}
        path = Path(artifact)
        if path.is_file():
            path, found["gguf_file"] = path.parent, path.name
        if backend:
            from transformers import AutoRoundConfig

            found["quantization_config"] = AutoRoundConfig(backend=backend)
        self.model = AutoModelForCausalLM.from_pretrained(path, device_map="cpu", **found).eval()

    @torch.no_grad()
    def scores(self, prompt: Sequence[int]) -> np.ndarray:
        return self.model(torch.tensor([list(prompt)]), use_cache=False).logits[0].float().numpy()

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        tokens, ids, cache = [], torch.tensor([list(prompt)]), None
        for _ in range(new_tokens):
            found = self.model(ids, past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            tokens.append(int(found.logits[0, -1].argmax()))
            ids = torch.tensor([[tokens[-1]]])
        return tokens

    def layers(self) -> dict[str, int]:
        leaves = (type(module).__name__ for module in self.model.modules() if not list(module.children()))
        return dict(Counter(name for name in leaves if "Linear" in name))


if __name__ == "__main__":
    serve(TransformersEngine, "transformers", "torch", "auto-round", "compressed-tensors", "gguf")
