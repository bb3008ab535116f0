"""Export formats by name. A name may carry a packing: `auto_round:auto_awq`."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

from auto_round.plan import ModelPlan, PlanError
from auto_round.schemes import GGUF_FILES

if TYPE_CHECKING:
    from auto_round.formats.base import ExportFormat

# A format is built with the plan and its name here: the variants of auto_round fix the packing that the plain name
# chooses from the plan.
FORMATS: dict[str, str] = {
    "auto_round": "auto_round.formats.auto_round:AutoRoundFormat",
    "auto_round:auto_gptq": "auto_round.formats.auto_round:AutoRoundFormat",
    "auto_round:auto_awq": "auto_round.formats.auto_round:AutoRoundFormat",
    "auto_round:gptqmodel": "auto_round.formats.auto_round:AutoRoundFormat",
    "auto_round:llm_compressor": "auto_round.formats.auto_round:AutoRoundFormat",
    "auto_round:fp8_static": "auto_round.formats.auto_round:AutoRoundFormat",
    "auto_round:fp8": "auto_round.formats.auto_round:AutoRoundFormat",
    "auto_round:int8": "auto_round.formats.auto_round:AutoRoundFormat",
    "fp8": "auto_round.formats.fp8:Fp8Format",
    "llm_compressor": "auto_round.formats.llm_compressor:LlmCompressorFormat",
    "auto_gptq": "auto_round.formats.auto_gptq:AutoGptqFormat",
    "auto_awq": "auto_round.formats.auto_awq:AutoAwqFormat",
    **{f"gguf:{name.lower()}": "auto_round.formats.gguf:GgufFormat" for name in GGUF_FILES},
    "mlx": "auto_round.formats.mlx:MlxFormat",
    "fake": "auto_round.formats.fake:FakeFormat",
}
# Whose readers, vLLM first, take layers for multi-token prediction by their names, in a width of their own.
HOLD_DRAFTS = ("auto_round", "auto_round:auto_gptq", "auto_round:gptqmodel")
ALIASES = {"auto_round:gptq": "auto_round:auto_gptq", "auto_round:awq": "auto_round:auto_awq"}


def format_name(name: str) -> str:
    """The name in `FORMATS` that a person's spelling means (any case, `-` for `_`).

    Raises:
        PlanError: no such format; the message lists the known ones and the nearest.
    """
    wanted = name.strip().lower().replace("-", "_")
    wanted = ALIASES.get(wanted, wanted)
    if wanted not in FORMATS:
        close = difflib.get_close_matches(wanted, FORMATS, n=1, cutoff=0.5)
        nearest = f"; did you mean {close[0]!r}?" if close else ""
        raise PlanError(f"unknown format {name!r}{nearest}; known: {', '.join(FORMATS)}")
    return wanted


def make_format(name: str, plan: ModelPlan) -> ExportFormat:
    """Bind a format to a plan. Raises PlanError if there is no such format or it cannot hold the plan.

    The format's own `plan` leaves layers for multi-token prediction as they are where it does not hold them.
    """
    known = format_name(name)
    if known not in HOLD_DRAFTS:
        plan = plan.without_drafts(f"{known} leaves it as it is")
    module, attribute = FORMATS[known].split(":")
    tables = [layer.name for layer in plan.quantized().values() if layer.info.role == "embedding"]
    if tables and known != "fake" and not known.startswith("gguf:"):
        raise PlanError(f"only GGUF files hold a quantized embedding, and {known} cannot take that of {tables[0]}")
    return getattr(importlib.import_module(module), attribute)(plan, known)
