"""What is exported and who has to read it: scheme × format × client, as data.

`refuses` holds what a client is known not to load, with the reason, so that the tables say it and the benchmark sees
whether that is still so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from auto_round.schemes import parse_scheme

LOGITS = 0.01  # relative error against the dequantized reference
LOGITS_ACTIVATIONS = 0.025  # where activations are quantized: by the scheme, or by the client (llama.cpp: 8 bits)
NOISE_MARGIN = 1.25  # two roundings of the same model differ a little more than one from the exact one

# Name → arguments of AutoRound. Widths other than 4 have groups of 64, which all readers' kernels take.
SCHEMES: dict[str, dict[str, Any]] = {
    **{f"W{bits}A16": {"scheme": f"W{bits}A16G64"} for bits in (2, 3, 5, 6, 7, 8)},
    **{f"W{bits}A16 asym": {"scheme": f"W{bits}A16G64", "sym": False} for bits in range(2, 9)},
    "W4A16": {"scheme": "W4A16"},
    "W4A16 g32": {"scheme": "W4A16G32"},
    "W4A16 per channel": {"scheme": "W4A16", "group_size": -1},
    "W4/W8 mixed": {"scheme": "W4A16G64", "layer_config": {"down_proj": {"bits": 8}}},
    "W4A16 lm_head": {"scheme": "W4A16G64", "quant_lm_head": True},
    **{
        name: {"scheme": name}
        for name in ("MXFP4", "MXFP8", "MXFP4_RCEIL", "MXFP8_RCEIL", "MXINT4", "NVFP4", "FPW8A16", "FP8_STATIC")
    },
    **{name: {"scheme": name} for name in ("FP8_BLOCK", "INT8")},
}
GGUF_FILES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L"),
    *("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
)
SCHEMES |= {f"GGUF:{name}": {"scheme": f"GGUF:{name}"} for name in GGUF_FILES}


@dataclass(frozen=True)
class Client:
    """A program of this folder and the environment that it runs in (None: the tests' own)."""

    program: str
    environment: str | None = None
    option: str | None = None
    tolerance: float = LOGITS


CLIENTS: dict[str, Client] = {
    "transformers": Client("run_transformers.py"),
    "transformers float32": Client("run_transformers.py", option="float32"),
    "AutoRoundConfig": Client("run_transformers.py", option="auto,auto"),
    "vllm": Client("run_vllm.py", "vllm"),
    "gptqmodel": Client("run_gptqmodel.py", "gptqmodel", "torch"),
    "gptqmodel awq": Client("run_gptqmodel.py", "gptqmodel", "awq_torch"),
    "llama.cpp": Client("run_llamacpp.py", "llamacpp", tolerance=LOGITS_ACTIVATIONS),
    "mlx-lm": Client("run_mlx.py", "mlx", "float32"),
}


@dataclass(frozen=True)
class Row:
    """A scheme in a format, the clients that must read it, and those that cannot, with the reason.

    rounds_inputs: whether the clients round inputs where the scheme says so.
    """

    format: str
    scheme: str
    clients: tuple[str, ...]
    refuses: Mapping[str, str] = field(default_factory=dict, hash=False)
    rounds_inputs: bool = True

    @property
    def name(self) -> str:
        return f"{self.format} {self.scheme}"

    def cases(self) -> Iterator[tuple[Row, str]]:
        return ((self, client) for client in self.clients)


_FOUR_BITS = {"vllm": "its CPU kernels take 4 bits only"}
_ZEROS = {"vllm": "its CPU kernels take asymmetric layers in the AWQ layout only"}
_FOREIGN_ZEROS = {"gptqmodel": "takes asymmetric layers of its own recent versions only"}
_NO_CPU_KERNEL = {"vllm": "no kernel for a CPU"}


def _auto_round() -> Iterator[Row]:
    for bits in (2, 3, 5, 6, 7, 8):
        yield Row("auto_round", f"W{bits}A16", ("transformers",), _FOUR_BITS)
        yield Row("auto_round", f"W{bits}A16 asym", ("transformers",), _ZEROS)
    yield Row("auto_round", "W4/W8 mixed", ("transformers",), _FOUR_BITS)
    for scheme in ("W4A16", "W4A16 g32", "W4A16 per channel", "W4A16 asym", "W4A16 lm_head"):
        yield Row("auto_round", scheme, ("transformers", "vllm"))
    yield Row("auto_round:auto_awq", "W4A16", ("transformers",), {"vllm": "its AWQ path wants an operator of GPUs"})
    yield Row("auto_round:gptqmodel", "W4A16", ("transformers",), {"vllm": "does not know this packing"})
    for scheme in ("MXFP4", "MXFP8", "MXFP4_RCEIL", "MXFP8_RCEIL", "MXINT4", "NVFP4"):
        yield Row("auto_round", scheme, ("transformers", "transformers float32"), _NO_CPU_KERNEL)
    for scheme in ("FPW8A16", "FP8_STATIC", "FP8_BLOCK", "INT8"):
        yield Row("auto_round", scheme, ("transformers", "transformers float32"), _NO_CPU_KERNEL)


def _gptq_and_awq() -> Iterator[Row]:
    for scheme in ("W2A16", "W3A16", "W8A16", "W4/W8 mixed"):
        yield Row("auto_gptq", scheme, ("AutoRoundConfig", "gptqmodel"), _FOUR_BITS)
    yield Row("auto_gptq", "W4A16", ("AutoRoundConfig", "vllm", "gptqmodel"))
    for bits in (2, 3, 4, 8):
        yield Row("auto_gptq", f"W{bits}A16 asym", ("AutoRoundConfig",), {**_ZEROS, **_FOREIGN_ZEROS})
    for scheme in ("W4A16", "W4A16 asym"):
        yield Row("auto_awq", scheme, ("AutoRoundConfig", "vllm", "gptqmodel awq"))


def _llm_compressor() -> Iterator[Row]:
    for scheme in ("W4A16", "W4A16 asym"):
        yield Row("llm_compressor", scheme, ("transformers", "vllm"))
    for scheme in ("W8A16", "W8A16 asym", "W4/W8 mixed"):
        yield Row("llm_compressor", scheme, ("transformers",), _FOUR_BITS)
    yield Row("llm_compressor", "INT8", ("transformers", "vllm"))
    for scheme in ("FP8_STATIC", "FP8_BLOCK", "MXFP4", "MXFP8", "NVFP4"):
        yield Row("llm_compressor", scheme, ("transformers",), _NO_CPU_KERNEL)


def _others() -> Iterator[Row]:
    for name in GGUF_FILES:
        yield Row(f"gguf:{name.lower()}", f"GGUF:{name}", ("transformers", "llama.cpp"))
    for bits in (2, 3, 4, 5, 6, 8):
        yield Row("mlx", f"W{bits}A16" if bits != 4 else "W4A16", ("mlx-lm",))
    yield Row("mlx", "W4A16 asym", ("mlx-lm",))
    yield Row("mlx", "W4/W8 mixed", ("mlx-lm",))
    yield Row("fp8", "FP8_BLOCK", ("transformers",), rounds_inputs=False)  # on a CPU it dequantizes and leaves them
    for scheme in ("W4A16", "W2A16 asym"):
        yield Row("fake", scheme, ("transformers",))


MATRIX: tuple[Row, ...] = (*_auto_round(), *_gptq_and_awq(), *_llm_compressor(), *_others())
CASES: tuple[tuple[Row, str], ...] = tuple(case for row in MATRIX for case in row.cases())


def tolerance(row: Row, client: str) -> float:
    """The largest relative error of a client's logits that counts as the same model."""
    scheme = parse_scheme(SCHEMES[row.scheme]["scheme"])
    return LOGITS_ACTIVATIONS if scheme.act is not None and row.rounds_inputs else CLIENTS[client].tolerance


def is_same(row: Row, client: str, error: float, same_text: bool, noise: float) -> bool:
    """Whether a client computes the reference's model.

    noise: how far rounding to bfloat16 alone moves the reference. Inputs of 4 bits amplify it: a last bit decides which
    of few codes is taken, and logits end up several percent apart, in the reference itself too. A client that computes
    in bfloat16 then has to stay near that, and its text proves nothing; one in float32 has to be exact.
    """
    bound = tolerance(row, client)
    if noise > bound and CLIENTS[client].option != "float32":
        return error <= NOISE_MARGIN * noise
    return same_text and error <= bound
