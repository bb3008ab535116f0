"""GPTQModel as a client of GPTQ and AWQ checkpoints, on the backends that need no compiler.

The option is the name of a backend: "torch" (the default) for GPTQ, "awq_torch" for AWQ.
"""

from __future__ import annotations

from gptqmodel import BACKEND, GPTQModel
from protocol import serve
from run_transformers import TransformersEngine


class GptqModelEngine(TransformersEngine):
    """GPTQModel wraps a Transformers model, which is called the same way."""

    def __init__(self, artifact: str, option: str | None):
        self.model = GPTQModel.load(artifact, device="cpu", backend=BACKEND[(option or "torch").upper()]).model.eval()


if __name__ == "__main__":
    serve(GptqModelEngine, "gptqmodel", "transformers", "torch")
