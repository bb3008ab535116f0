"""The doctor: runs the whole contract on a tiny random clone of a model, and says what is wrong and what mends it.

`diagnose` never raises for a broken model: each check ends in a finding. Checks are functions over a shared
`Context`; one that needs what an earlier one did not find is "not reached".
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from auto_round.doctor import fused, running, structure
from auto_round.doctor.context import Context
from auto_round.doctor.finding import FAILED, SKIPPED, Finding, Symptom, failure, message, where
from auto_round.logger import logger


@dataclass(frozen=True)
class Check:
    """A check, and the fields of the context that it needs."""

    name: str
    function: Callable[[Context], Finding]
    needs: tuple[str, ...] = ()


CHECKS: tuple[Check, ...] = (
    Check("configuration", structure.check_configuration),
    Check("tiny clone", structure.check_clone, ("source",)),
    Check("text forward", structure.check_forward, ("model",)),
    Check("blocks", structure.check_blocks, ("samples",)),
    Check("layers", structure.check_layers, ("stacks",)),
    Check("coverage", structure.check_coverage, ("stacks", "sound")),
    Check("fused modules", fused.check_fused, ("adapted", "logits")),
    Check("replay = model", running.check_replay, ("run", "stacks", "sound")),
    Check("calib()", running.check_calib, ("native",)),
    Check("_quantize_blocks()", running.check_quantize, ("calibrated",)),
    Check("save", running.check_save, ("store",)),
    Check("reload", running.check_reload, ("out",)),
    Check("logits", running.check_logits, ("loaded",)),
    Check("stored names", running.check_names, ("out",)),
)


def diagnose(
    model_or_config: Any,
    scheme: str = "W4A16",
    trust_remote_code: bool = False,
    on_finding: Callable[[Finding], None] | None = None,
) -> list[Finding]:
    """Examine a model type.

    Args:
        model_or_config: a model folder, a hub id, a config.json, a configuration, or a model (whose weights are not
            looked at). Only the configuration is read.
        scheme: what the clone is quantized to, in groups of 32.
        trust_remote_code: run Python code that the model's folder brings.
        on_finding: called with each finding as soon as it is there.

    Returns:
        One finding for each check, in the order of `CHECKS`.
    """
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="auto_round_doctor_") as work, _quietly():
        context = Context(model_or_config, Path(work), scheme, trust_remote_code)
        for check in CHECKS:
            findings.append(_run(check, context, findings))
            if on_finding is not None:
                on_finding(findings[-1])
    return findings


def _run(check: Check, context: Context, before: Sequence[Finding]) -> Finding:
    broken = [finding.check for finding in before if finding.failed]
    missing = [name for name in check.needs if getattr(context, name) is None or getattr(context, name) is False]
    if missing:
        earlier = broken[-1] if broken else "an earlier check"
        return Finding(check.name, SKIPPED, detail=f"{earlier!r} comes first")
    try:
        finding = check.function(context)
        finding.check = check.name
    except Symptom as problem:
        context.sound = False
        finding = failure(check.name, problem, context.model_type, context.class_name)
    except Exception as error:  # a defect of the check itself, or what nobody has thought of
        context.sound = False
        cause = f"{where(error, context.models())[0]}{message(error)}"
        remedy = "report it with the traceback that --debug shows"
        finding = Finding(check.name, FAILED, symptom="the check itself fails", cause=cause, remedy=remedy)
        logger.debug("the check %r", check.name, exc_info=error)
    finding.cause = finding.cause.replace(str(context.work / "source"), "the clone's folder")
    return finding


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the messages, warnings and progress bars of the runs that the checks make."""
    from transformers.utils import logging as library

    noisy = [logger] if logger.level > logging.DEBUG or logger.level == logging.NOTSET else []
    levels = [log.level for log in noisy]
    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    try:
        for log in noisy:
            log.setLevel(logging.ERROR)
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(noisy, levels, strict=True):
            log.setLevel(level)
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()


def passed(findings: Sequence[Finding]) -> bool:
    """Whether no check failed."""
    return not any(finding.failed for finding in findings)


def as_plain(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as plain values, for a JSON file."""
    first = findings[0].facts if findings else {}
    return {
        "model": first.get("source", ""),
        "model_type": first.get("model_type", ""),
        "passed": passed(findings),
        "findings": [asdict(finding) for finding in findings],
    }
