"""Writing the starting point for a model type: what mends it, with the facts found filled in, and its test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auto_round.doctor import templates
from auto_round.doctor.finding import Finding, file_name
from auto_round.doctor.tiny import tiny_config

TASKS = ("CausalLM", "ImageTextToText", "MultimodalLM", "Seq2SeqLM", "SpeechSeq2Seq")
_WHAT = {
    "blocks": "where its blocks are",
    "layers": "its layer types",
    "forward": "a forward that samples can drive",
    "cache": "arguments that samples share",
}


class ScaffoldError(RuntimeError):
    """Nothing could be written; the message says why."""


@dataclass
class Scaffold:
    """What was written, and what a person does next."""

    files: list[Path] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)


def scaffold(findings: Sequence[Finding], output: str | Path = ".", force: bool = False) -> Scaffold:
    """Write the starting point that findings call for under `output`, in the places of a checkout of auto_round.

    Raises:
        ScaffoldError: the configuration could not be read or built, or a file exists and `force` is not given.
    """
    facts = {finding.check: finding.facts for finding in findings}
    if not facts.get("configuration") or not facts.get("tiny clone", {}).get("class"):
        bad = next((f for f in findings if f.failed), None)
        why = f": {bad.cause}; {bad.remedy}" if bad else ""
        raise ScaffoldError(f"there is no tiny clone to scaffold from{why}")
    model_type = facts["configuration"]["model_type"]
    name, root = file_name(model_type), Path(output)
    texts: dict[Path, str] = {}
    plan = Scaffold()
    for finding in findings:
        if finding.failed and finding.facts.get("extension"):
            _mend(finding, model_type, name, facts, root, texts, plan)
    test = root / "test" / "models" / f"test_{name}.py"
    texts[test] = _test(facts, model_type, name)
    _last_steps(findings, test, plan)
    taken = [str(path) for path in texts if path.exists()]
    if taken and not force:
        raise ScaffoldError(f"{', '.join(taken)} exists: pass --force to overwrite it, or another --output")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        plan.files.append(path)
    return plan


def _last_steps(findings: Sequence[Finding], test: Path, plan: Scaffold) -> None:
    bad = [finding for finding in findings if finding.failed]
    if not bad:
        plan.steps.append("no code is needed: the model passes as it is; keep the test")
    plan.steps += [f"{finding.check}: {finding.remedy}" for finding in bad if not finding.facts.get("extension")]
    if bad:
        plan.steps.append("fill in what the test expects (stacks, number of layers) once the model passes")
    plan.steps.append(f"run it: pytest {test}")


def _mend(
    finding: Finding,
    model_type: str,
    name: str,
    facts: Mapping[str, Any],
    root: Path,
    texts: dict[Path, str],
    plan: Scaffold,
) -> None:
    """Add the file for one failed check, and what to do with it."""
    kind = finding.facts["extension"]
    if kind == "unfusing":
        path = root / "auto_round" / "modeling" / "fused_moe" / f"{name}.py"
        modules = finding.facts.get("fused") or []
        if modules and path not in texts:
            texts[path] = templates.unfuser(model_type, modules)
            entry = f'"{model_type}": LazyImport(f"{{_PACKAGE}}.{name}"),'
            plan.steps.append(f"{path}: take the number of experts, the orientation and the names from the model")
            plan.steps.append(f"auto_round/modeling/fused_moe/replace_modules.py: add {entry} to BUILTIN_MODULES")
        return
    path = root / f"{name}_{kind}.py"
    own = finding.facts
    body = {
        "blocks": lambda: templates.block_handler(model_type, own.get("stacks") or []),
        "layers": lambda: templates.layer_types(own.get("unknown") or []),
        "forward": lambda: templates.forward_handler(model_type, own.get("forward") or [], own.get("state") or {}),
        "cache": lambda: templates.shared_keys(facts["tiny clone"]["class"][1], own.get("keys") or []),
    }[kind]()
    texts[path] = templates.header(model_type, _WHAT[kind]) + body
    target = "auto_round/utils/common.py" if kind == "layers" else "auto_round/special_model_handler.py"
    plan.steps.append(f"{path}: correct it, then move the entry to {target}")


# ---- the test -----------------------------------------------------------------------------------------------------


def _test(facts: Mapping[str, Any], model_type: str, name: str) -> str:
    arguments = _expected(facts)
    module, cls = facts["tiny clone"]["class"]
    title = f"{cls}: a tiny random model through the contract."
    imports: dict[str, set[str]] = {"contract": {"check_model"}}
    task = _short_form(facts, cls)
    if task is not None:
        imports["tiny"] = {"tiny"}
        return templates.test_file(title, name, imports, "", f'tiny("{model_type}", "{task}")', arguments)
    if facts["configuration"].get("remote_code"):
        imports["auto_round.doctor.clone"] = {"tiny_clone"}
        setup = f"MODEL = {templates.literal(facts['configuration']['source'])}"
        model, arguments = "tiny_clone(MODEL, trust_remote_code=True)", [*arguments, "trust_remote_code=True"]
        return templates.test_file(title, name, imports, setup, model, arguments)
    config_module, config = facts["configuration"]["config_class"]
    imports["auto_round.doctor.tiny"] = {"build"}
    for origin, own in ((module, cls), (config_module, config)):
        imports.setdefault(_public(origin, own), set()).add(own)
    setup = f"CONFIG = {templates.literal(facts['tiny clone']['config'], used=9)}"
    return templates.test_file(title, name, imports, setup, f"build({config}.from_dict(CONFIG), {cls})", arguments)


def _public(module: str, name: str) -> str:
    """Where a class is imported from."""
    import transformers

    return "transformers" if hasattr(transformers, name) else module


def _short_form(facts: Mapping[str, Any], cls: str) -> str | None:
    """The task under which `tiny(model_type, task)` of the tests gives this very clone; None if there is none."""
    import transformers

    config = facts["tiny clone"]["config"]
    kind = getattr(transformers, facts["configuration"]["config_class"][1], None)
    if kind is None or facts["configuration"]["model_type"] not in transformers.CONFIG_MAPPING:
        return None
    default = tiny_config(transformers.CONFIG_MAPPING[facts["configuration"]["model_type"]]())
    if _plain(default) != _plain(kind.from_dict(dict(config))):
        return None
    for task in TASKS:
        auto = getattr(transformers, f"AutoModelFor{task}", None)
        if auto is None or kind not in auto._model_mapping:
            continue
        found = auto._model_mapping[kind]
        if (found[0] if isinstance(found, tuple) else found).__name__ == cls:
            return task
    return None


def _plain(config: Any) -> dict[str, Any]:
    noise = ("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")
    return {key: value for key, value in config.to_dict().items() if key not in noise}


def _expected(facts: Mapping[str, Any]) -> list[str]:
    """What the contract must find, as far as the doctor has found it."""
    arguments = []
    stacks = facts.get("blocks", {}).get("stacks") if facts.get("layers", {}).get("quantized") else None
    named = {stack[0].rpartition(".")[0]: len(stack) for stack in stacks or []}
    plain = [[f"{head}.{number}" for number in range(length)] for head, length in named.items()]
    if stacks and plain == [list(stack) for stack in stacks]:
        arguments.append(f"blocks={templates.literal(named)}")
    if facts.get("_quantize_blocks()", {}).get("losses"):
        arguments.append(f"layers={facts['layers']['quantized']}")
        replaced = facts.get("fused modules", {}).get("replaced")
        arguments += [f"fused={len(replaced)}"] if replaced else []
    return arguments
