"""`auto-round list`: schemes, formats, recipes, algorithms and (on request, as it asks PyTorch) backends."""

from __future__ import annotations

import difflib

from auto_round.algorithms import ALGORITHMS, ALIASES
from auto_round.cli.parser import Parser, UsageError, add_debug
from auto_round.report import scheme_words
from auto_round.schemes import GGUF_FILES, PRESET_SCHEMES, QuantizationScheme
from auto_round.settings import RECIPES

ABOUT = "Show what can be chosen: auto-round list [schemes|formats|recipes|algorithms|backends] [name]"

# A word about each entry of `formats.FORMATS`, with the weights it holds. (Importing that table loads PyTorch, which
# would make this command slow; a test keeps the two equal.)
FORMAT_NOTES: dict[str, tuple[str, str]] = {
    "auto_round": ("2-8 bits, and all float schemes", "packed; the layout is chosen from the scheme (default)"),
    "auto_round:auto_gptq": ("2-8 bits, symmetric", "the GPTQ layout, which the most readers know"),
    "auto_round:auto_awq": ("4 bits", "the AWQ layout"),
    "auto_round:gptqmodel": ("2-8 bits, symmetric and asymmetric", "the GPTQ layout, zero points as they are, g_idx"),
    "auto_round:llm_compressor": ("MXFP4, MXFP8, NVFP4", "the layouts of compressed-tensors"),
    "auto_round:fp8_static": ("FP8_STATIC", "float8 with fixed scales for activations"),
    "auto_round:fp8": ("FP8_BLOCK, FPW8A16", "float8 with dynamic or no scales for activations"),
    "auto_round:int8": ("INT8", "8 bits for weights and activations"),
    "llm_compressor": ("2-8 bits, asymmetric in one scheme; all float schemes", "compressed-tensors"),
    "auto_gptq": ("2, 3, 4 and 8 bits, symmetric and asymmetric", "a GPTQ checkpoint, for GPTQModel and vLLM"),
    "auto_awq": ("4 bits, one group size", "an AWQ checkpoint (gemm), for AutoAWQ and vLLM"),
    **{f"gguf:{name.lower()}": (f"mostly {kind}", "a file for llama.cpp") for name, kind in GGUF_FILES.items()},
    "fp8": ("FP8_BLOCK", "fine-grained float8, for Transformers, vLLM and SGLang"),
    "mlx": ("2-6 and 8 bits, groups of 32, 64 or 128", "for mlx-lm"),
    "fake": ("2-8 bits, symmetric and asymmetric", "dequantized floats in an ordinary checkpoint"),
}
ALGORITHM_NOTES: dict[str, str] = {
    "signround": "tunes rounding and clipping by signed gradients (arXiv 2309.05516); for iters above 0",
    "adamround": "tunes them with Adam instead of signs; 2 bytes more a weight",
    "rtn": "rounds to nearest, with scales searched or (--disable_opt_rtn) taken from the range; for iters 0",
}
NOUNS = ("schemes", "formats", "recipes", "algorithms", "backends")
_ALIASES = {"alg": "algorithms", "algs": "algorithms", "algorithm": "algorithms"}


def run(arguments: list[str]) -> int:
    parser = Parser("list", ABOUT, "noun name")
    add_debug(parser)
    options = parser.parse([argument for argument in arguments if argument != "--list"])
    shown = NOUNS[:-1] if options.noun is None else (_noun(options.noun),)
    for noun in shown:
        _print(noun, options.name)
    return 0


def _noun(word: str) -> str:
    word = word.lower()
    plural = _ALIASES.get(word, word if word.endswith("s") else word + "s")
    if plural not in NOUNS:
        close = difflib.get_close_matches(plural, NOUNS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(NOUNS)}"
        raise UsageError(f"there is no list of {word!r}; {hint}")
    return plural


def _print(noun: str, name: str | None) -> None:
    from auto_round.cli.summary import print_table

    head, rows = {
        "schemes": _schemes,
        "formats": _formats,
        "recipes": _recipes,
        "algorithms": _algorithms,
        "backends": _backends,
    }[noun]()
    if name is not None:
        rows = [row for row in rows if row[0].lower() == name.lower()]
        if not rows:
            raise UsageError(f"there is no {noun[:-1]} {name!r}; `auto-round list {noun}` shows them all")
    print_table(noun.capitalize(), head, rows)


def _schemes() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = [(name, *_scheme_cells(scheme)) for name, scheme in PRESET_SCHEMES.items()]
    return ("scheme", "weights", "group size", "symmetric", "activations"), rows


def _scheme_cells(scheme: QuantizationScheme) -> tuple[str, ...]:
    if not scheme.is_quantized:
        return "as they are", "", "", "as they are"
    act = scheme.act
    inputs = "as they are" if act is None else f"{act.bits} bits, {'dynamic' if act.dynamic else 'fixed scale'}"
    words = scheme_words({**scheme.to_dict(), "status": "quantized", "act_bits": 16}).split(", ")
    return words[0], str(scheme.group_size), "yes" if scheme.sym else "no", inputs


def _formats() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return ("format", "holds", "what it is"), [(name, *notes) for name, notes in FORMAT_NOTES.items()]


def _recipes() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = []
    for name, values in RECIPES.items():
        command = "auto-round" if name == "default" else f"auto-round-{name.replace('_', '-')}"
        rows.append((name, command, ", ".join(f"{key}={value}" for key, value in values.items())))
    return ("recipe", "command", "settings that you leave unset"), rows


def _algorithms() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = []
    for name in ALGORITHMS:
        aliases = ", ".join(alias for alias, target in ALIASES.items() if target == name)
        rows.append((name, aliases, ALGORITHM_NOTES.get(name, "")))
    return ("algorithm", "aliases", "what it does"), rows


def _backends() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    import importlib.util

    from auto_round.inference.backends import BACKENDS

    rows = []
    for name, row in sorted(BACKENDS.items(), key=lambda item: -item[1].priority):
        missing = [package for package in row.requires if importlib.util.find_spec(package) is None]
        state = f"needs {', '.join(missing)}" if missing else "installed"
        rows.append((name, ", ".join(row.devices), ", ".join(map(str, row.bits)), state, row.about))
    return ("backend", "devices", "bits", "here", "what it is"), rows
