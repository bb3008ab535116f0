"""The doctor: healthy types pass, each kind of broken model gets its own symptom and remedy, scaffolds mend it."""

import dataclasses
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from broken_models import CONFIGS, Stub
from transformers import CONFIG_MAPPING, PreTrainedConfig, dynamic_module_utils

from auto_round import special_model_handler
from auto_round.cli.main import main
from auto_round.doctor import anatomy, running, templates
from auto_round.doctor.diagnose import CHECKS, as_plain, diagnose, passed
from auto_round.doctor.finding import Finding, message
from auto_round.doctor.scaffold import ScaffoldError, scaffold
from auto_round.modeling.fused_moe import replace_modules
from auto_round.utils import common

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def loggers():
    """The command configures loggers of the whole process; other tests in it should not notice."""
    found = [logging.getLogger(name) for name in ("auto_round", "transformers")]
    saved = [(log, log.level, log.handlers[:], log.propagate) for log in found]
    yield
    for log, level, handlers, propagate in saved:
        log.level, log.handlers, log.propagate = level, handlers, propagate


@pytest.fixture
def tables():
    """The extension points, put back when the test is over."""
    handler = special_model_handler
    found = (handler.SPECIAL_MULTIMODAL_BLOCK, handler.FORWARDS, handler.SPECIAL_SHARED_CACHE_KEYS)
    saved = [dict(table) for table in (*found, replace_modules._REPLACEMENTS)]
    types = common.INNER_SUPPORTED_LAYER_TYPES
    yield
    for table, entries in zip((*found, replace_modules._REPLACEMENTS), saved, strict=True):
        table.clear()
        table.update(entries)
    common.INNER_SUPPORTED_LAYER_TYPES = types


def config_file(folder: Path, config: PreTrainedConfig) -> Path:
    config.save_pretrained(folder)
    return folder / "config.json"


def told(findings: list[Finding]) -> str:
    return "\n".join(f"{f.check}: {f.status}; {f.symptom}; {f.cause}; {f.remedy}" for f in findings)


def first_failure(findings: list[Finding]) -> Finding:
    return next(finding for finding in findings if finding.failed)


def execute(file: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"scaffolded_{file.stem}", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


# ---- healthy types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "bamba"])
def test_healthy_types_pass(tmp_path, model_type):
    findings = diagnose(config_file(tmp_path, CONFIG_MAPPING[model_type]()))
    assert [finding.check for finding in findings] == [check.name for check in CHECKS]
    assert all(finding.status == "passed" and finding.detail for finding in findings), told(findings)
    assert passed(findings) and not any(finding.symptom or finding.remedy for finding in findings)
    facts = {finding.check: finding.facts for finding in findings}
    assert all("model.layers.0" in stack or "model.layers" not in stack[0] for stack in facts["blocks"]["stacks"])
    assert json.loads(json.dumps(as_plain(findings), default=str))["passed"] is True
    if model_type == "mixtral":
        assert set(facts["fused modules"]["errors"]) == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
        assert any("block_sparse_moe.experts.N.w1" in name for name in facts["stored names"]["layers"])
    if model_type == "llama":
        block = facts["replay = model"]["arguments"]["model.layers.0"]
        assert block["per sample"] == ["hidden_states"] and "position_embeddings[0]" in block["shared"]


def test_what_is_given_may_be_a_configuration_or_a_model():
    assert passed(diagnose(CONFIGS["Stub"](), scheme="W8A16"))
    assert passed(diagnose(Stub(CONFIGS["Stub"]())))


def test_own_code_is_run_only_when_it_is_trusted(tmp_path, monkeypatch):
    folder = tmp_path / "own"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "cache")])
    folder.mkdir()
    code = (HERE / "broken_models.py").read_text().partition("MODELS = ")[0]
    code += "class OwnConfig(PreTrainedConfig):\n    model_type = 'own_stub'\n"
    code += "    def __init__(self, vocab_size=320, hidden_size=128, num_hidden_layers=2, **kwargs):\n"
    code += "        self.vocab_size, self.hidden_size = vocab_size, hidden_size\n"
    code += "        self.num_hidden_layers = num_hidden_layers\n        super().__init__(**kwargs)\n\n\n"
    code += "class Own(Stub):\n    config_class = OwnConfig\n"
    (folder / "modeling_own.py").write_text(code)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    fields = {"model_type": "own_stub", "architectures": ["Own"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(fields))

    finding = first_failure(diagnose(folder))
    assert finding.check == "configuration" and "--trust_remote_code" in finding.remedy

    findings = diagnose(folder, trust_remote_code=True)
    assert passed(findings), told(findings)
    (test,) = scaffold(findings, tmp_path / "out").files
    assert "tiny_clone(MODEL, trust_remote_code=True)" in test.read_text()
    compile(test.read_text(), str(test), "exec")


# ---- broken ones --------------------------------------------------------------------------------------------------

BROKEN = {  # model: (check that fails, symptom, cause, remedy)
    "HiddenBlocks": ("blocks", "No quantizable layers found", "block_a, block_b (Block)", "SPECIAL_MULTIMODAL_BLOCK"),
    "UnknownLinear": ("layers", "Quantized 0/4 layers", "layer type Matrix is not known", "SUPPORTED_LAYER_TYPES"),
    "OpaqueMixture": ("layers", "Quantized 0/2 layers", "middle.first [256, 128]", "register_replacement('Mixture')"),
    "Stateful": ("replay = model", "wrong outputs or diverging", "memory of Remembering", "_handle_special_model"),
    "WrongKey": ("_quantize_blocks()", "cache key error", "KeyError: 8", "SPECIAL_SHARED_CACHE_KEYS['WrongKey']"),
    "NoText": ("text forward", "a forward over text fails", "weights_of_frames", "_handle_special_model"),
    "Nan": ("text forward", "wrong outputs", "not finite", "_handle_special_model"),
    "PlainList": ("text forward", "No quantizable layers found", "plain Python list", "nn.ModuleList"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_models_are_told_why(name):
    check, symptom, cause, remedy = BROKEN[name]
    findings = diagnose(CONFIGS[name]())
    finding = first_failure(findings)
    assert finding.check == check, told(findings)
    assert symptom in finding.symptom and cause in finding.cause and remedy in finding.remedy, told([finding])
    later = findings[findings.index(finding) + 1 :]
    assert not any(other.check in ("calib()", "save", "logits") and other.status == "passed" for other in later)
    assert sum(finding.failed for finding in findings) == 1


MENDED = ("HiddenBlocks", "UnknownLinear", "OpaqueMixture", "Stateful")


@pytest.mark.parametrize("name", MENDED)
def test_scaffolds_mend(tmp_path, tables, name):
    """What is written works as it stands for these: facts filled in, guesses right."""
    written = scaffold(diagnose(CONFIGS[name]()), tmp_path)
    assert written.files[-1] == tmp_path / "test" / "models" / f"test_broken_{name.lower()}.py"
    assert len(written.files) == 2 and all(file.exists() for file in written.files)
    assert any(str(written.files[0]) in step for step in written.steps)
    for file in written.files:
        compile(file.read_text(), str(file), "exec")
    execute(written.files[0])
    findings = diagnose(CONFIGS[name]())
    assert passed(findings), told(findings)


@pytest.mark.parametrize("name", ["NoText", "WrongKey"])
def test_scaffolds_import(tmp_path, tables, name):
    for file in scaffold(diagnose(CONFIGS[name]()), tmp_path).files:
        compile(file.read_text(), str(file), "exec")
        execute(file)
    handler = special_model_handler
    if name == "NoText":
        assert handler.FORWARDS["broken_notext"].__code__.co_varnames[:3] == ("model", "spectrum", "weights_of_frames")
    else:
        assert handler.SPECIAL_SHARED_CACHE_KEYS["WrongKey"] == ("shift",)


@pytest.mark.parametrize(
    ("subject", "cause"),
    [
        ("/nowhere/at/all", "neither a folder nor a file"),
        ("./nothing", "neither a folder nor a file"),
        ("{tmp}/empty", "no config.json"),
        ("{tmp}/bad.json", "not valid JSON"),
        ("{tmp}/strange.json", "does not recognize this architecture"),
        (7, "a int has no configuration"),
    ],
)
def test_unreadable_configurations(tmp_path, subject, cause):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "strange.json").write_text('{"model_type": "never_heard_of"}')
    findings = diagnose(subject.format(tmp=tmp_path) if isinstance(subject, str) else subject)
    assert findings[0].failed and cause in findings[0].cause and findings[0].remedy, told(findings[:1])
    assert {finding.status for finding in findings[1:]} == {"not reached"}
    with pytest.raises(ScaffoldError, match="no tiny clone"):
        scaffold(findings, tmp_path)


def test_what_the_checks_do_not_foresee_is_a_finding(monkeypatch):
    def burst(*arguments, **options):
        raise ZeroDivisionError("in the middle")

    monkeypatch.setattr(anatomy, "stack_names", burst)
    finding = first_failure(diagnose(CONFIGS["Stub"]()))
    assert finding.check == "blocks" and "ZeroDivisionError: in the middle" in finding.cause
    monkeypatch.undo()
    monkeypatch.setattr("auto_round.doctor.structure.make_clone", burst)
    finding = first_failure(diagnose(CONFIGS["Stub"]()))
    assert finding.check == "tiny clone" and "auto_round/doctor/sizes.py" in finding.remedy


def test_wrong_results_are_seen(monkeypatch):
    """The last checks judge by themselves: a result that is too far away, names that are not the checkpoint's."""
    monkeypatch.setattr(running, "SLOPE", 0.0)
    monkeypatch.setattr(running, "SLACK", 0.0)
    finding = first_failure(diagnose(CONFIGS["Stub"]()))
    assert (finding.check, finding.symptom) == ("logits", "wrong outputs")
    monkeypatch.undo()
    real = running.Checkpoint.names

    def check_names(ctx):
        with pytest.MonkeyPatch.context() as patch:
            names = {ctx.out: [f"other.{name}" for name in real(running.Checkpoint(ctx.out))]}
            patch.setattr(running.Checkpoint, "names", lambda self: names.get(self.directory) or real(self))
            return running.check_names(ctx)

    checks = [dataclasses.replace(c, function=check_names) if c.name == "stored names" else c for c in CHECKS]
    monkeypatch.setattr("auto_round.doctor.diagnose.CHECKS", tuple(checks))
    finding = first_failure(diagnose(CONFIGS["Stub"]()))
    assert finding.check == "stored names" and "no such source tensor" in finding.cause


# ---- pieces -------------------------------------------------------------------------------------------------------


def test_literals_are_python():
    value = {"a": [1, 2.5, None, True], "b": {"c": (float("inf"), "\"'")}, 0: ["x" * 50, "y" * 50, "z" * 50], "d": (1,)}
    assert eval(templates.literal(value)) == value  # our own text
    assert all(len(line) <= 120 for line in templates.literal(value).splitlines())


def test_fused_parameters_of_three_matrices():
    """Gate, up and down of equal shape: the last one is stored input first."""
    model = torch.nn.Module()
    model.config = CONFIGS["Stub"]()
    model.experts = torch.nn.Module()
    for name in ("gate", "up", "down"):
        model.experts.register_parameter(name, torch.nn.Parameter(torch.zeros(4 * 32, 128)))
    (facts,) = anatomy.fused_facts(model, ["experts.gate", "experts.up", "experts.down"])
    assert [guess["transposed"] for guess in facts["parameters"].values()] == [False, False, True]
    assert {guess["rows"] for guess in facts["parameters"].values()} == {32}


def test_messages_are_short():
    assert message(ValueError("a\n\n  b")) == "ValueError: a b"
    assert len(message(ValueError("x" * 5000))) < 600


# ---- the command --------------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    config = str(config_file(tmp_path / "model", CONFIG_MAPPING["llama"]()))
    out = tmp_path / "out"
    arguments = ["doctor", "--scaffold", config, "--output", str(out), "--json", str(tmp_path / "findings.json")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "14 of 14 checks passed" in printed and "no code is needed" in printed
    assert json.loads((tmp_path / "findings.json").read_text())["model_type"] == "llama"
    files = [path for path in out.rglob("*") if path.is_file()]
    assert files == [out / "test" / "models" / "test_llama.py"]

    assert main(arguments) == 1
    assert "pass --force to overwrite it" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0

    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", str(files[0])]
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_command_with_a_broken_model(tmp_path, capsys):
    config = config_file(tmp_path, CONFIGS["HiddenBlocks"]())
    assert main(["doctor", str(config)]) == 1
    printed = capsys.readouterr().out
    for word in ("No quantizable layers found", "block_a, block_b (Block)", "SPECIAL_MULTIMODAL_BLOCK", "1 failed"):
        assert word in printed


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "x", "--output", "y"], ["doctor", "x", "--scheme", "W9"]])
def test_command_line_mistakes(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("auto-round: ")
