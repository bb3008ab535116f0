"""What the doctor says: findings, the extension points it sends people to, and how an exception becomes words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

PASSED, WARNING, FAILED, SKIPPED = "passed", "warning", "failed", "not reached"
LONGEST = 500  # characters of a message that another library wrote

_HANDLER = "auto_round/special_model_handler.py"

# Extension point -> (the symptom that people see, what mends it). Fields in braces are filled in for the model.
TABLE: dict[str, tuple[str, str]] = {
    "blocks": (
        "No quantizable layers found",
        f"block detection: add SPECIAL_MULTIMODAL_BLOCK[{{type!r}}] = a handler that lists the blocks, in {_HANDLER}; "
        "where the blocks are members of a list, to_quant_block_names can name them",
    ),
    "layers": (
        "Quantized {done}/{total} layers",
        "layer types: add {classes} to SUPPORTED_LAYER_TYPES (the class), or to INNER_SUPPORTED_LAYER_TYPES (its "
        "name), in auto_round/utils/common.py",
    ),
    "unfusing": (
        "shape mismatch in MoE layers, or weights that no layer covers",
        "unfusing: write auto_round/modeling/fused_moe/{file}.py with register_replacement({classes}), and enter it in "
        "BUILTIN_MODULES[{type!r}] in auto_round/modeling/fused_moe/replace_modules.py",
    ),
    "forward": (
        "wrong outputs or diverging calibration",
        f"custom forward: add FORWARDS[{{type!r}}], which _handle_special_model puts in the place of the model's own, "
        f"in {_HANDLER}",
    ),
    "cache": (
        "cache key error",
        f"shared cache keys: add SPECIAL_SHARED_CACHE_KEYS[{{model!r}}] = ({{keys}},) in {_HANDLER}",
    ),
}


@dataclass
class Finding:
    """The outcome of one check.

    Attributes:
        check: its name. status: "passed", "warning", "failed" or "not reached".
        detail: what was found, in one line. facts: the same as plain values.
        symptom, cause, remedy: of a failure: what people see, why it is so in this model, what mends it.
    """

    check: str
    status: str = PASSED
    detail: str = ""
    symptom: str = ""
    cause: str = ""
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.status == FAILED


class Symptom(Exception):
    """Raised by a check that fails. `extension` is a key of `TABLE`, or empty where the remedy is said directly."""

    def __init__(
        self, cause: str, extension: str = "", *, symptom: str = "", remedy: str = "", facts: Any = None, **fields: Any
    ):
        super().__init__(cause)
        self.cause, self.extension, self.symptom, self.remedy = cause, extension, symptom, remedy
        self.facts, self.fields = dict(facts or {}), fields


def failure(check: str, problem: Symptom, model_type: str, model_name: str) -> Finding:
    """The finding of a failed check, in the words of the table."""
    fields = {"done": 0, "total": 0, "classes": "…", "keys": "…", **problem.fields}
    fields |= {"type": model_type, "file": file_name(model_type), "model": model_name}
    symptom, remedy = problem.symptom, problem.remedy
    if problem.extension:
        words, way = (text.format(**fields) for text in TABLE[problem.extension])
        symptom, remedy = symptom or words, remedy or way
    facts = {**problem.facts, **({"extension": problem.extension} if problem.extension else {})}
    return Finding(check, FAILED, "", symptom, problem.cause, remedy, facts)


def wrong_names(error: BaseException) -> Symptom:
    """The checkpoint and the model do not know each other's names."""
    remedy = (
        "compare with Transformers' weight conversions of the type; what they cannot tell is mended in "
        "auto_round/modeling/name_map.py"
    )
    return Symptom(message(error), symptom="the checkpoint's names do not fit the model", remedy=remedy)


def file_name(model_type: str) -> str:
    """A model type as the name of a Python file."""
    return re.sub(r"\W", "_", model_type) or "model"


def message(error: BaseException) -> str:
    """An exception in one line, cut to a length that people read."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def where(error: BaseException, models: Iterable[nn.Module] = ()) -> tuple[str, nn.Module | None]:
    """(`in model.layers.0.mlp (FooMoe), line 12 of modeling_foo.py: `, that module) of the innermost model code."""
    names = {id(module): name for model in models for name, module in model.named_modules()}
    found: tuple[str, nn.Module | None] = ("", None)
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        owner, file = frame.f_locals.get("self"), frame.f_code.co_filename
        ours = "/auto_round/" in file and "/fused_moe/" not in file
        if isinstance(owner, nn.Module) and not ours and "/torch/nn/modules/module.py" not in file:
            name = names.get(id(owner), "")
            place = f"line {trace.tb_lineno} of {file.rpartition('/')[2]}"
            found = (f"in {name} ({type(owner).__name__}), {place}: ".replace("in  (", "in ("), owner)
        trace = trace.tb_next
    return found


def patterns(names: Iterable[str]) -> list[str]:
    """Names with their numbers as N, each once: `model.layers.N.mlp`."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name) for name in names))


def listed(names: Iterable[str], most: int = 4) -> str:
    """`a, b and 3 more`."""
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
