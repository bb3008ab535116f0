"""Nothing that a model's folder brings is run, and nothing outside it is read, unless its owner is trusted."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import command, original

from auto_round import AutoRound
from auto_round.calibration.data import CalibrationDataError, build_calibration
from auto_round.calibration.processors import load_processor
from auto_round.inference.load import load_model
from auto_round.modeling.checkpoint import Checkpoint, CheckpointError
from auto_round.modeling.reading import stays_inside
from auto_round.utils.model import load_config, load_tokenizer

TRUST = "trust_remote_code"
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ProcessorMixin

Path({marker!r}).write_text("ran")


class OwnConfig(LlamaConfig):
    model_type = "{kind}"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass


class OwnProcessor(ProcessorMixin):
    pass
"""
MAPS = {
    "config.json": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    "tokenizer_config.json": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
    "processor_config.json": {"AutoProcessor": "own.OwnProcessor"},
    "preprocessor_config.json": {"AutoImageProcessor": "own.OwnProcessor", "AutoProcessor": "own.OwnProcessor"},
}
CLASSES = {"tokenizer_config.json": {"tokenizer_class": "OwnTokenizer"}}


def settings_in(file: Path, **changes: Any) -> None:
    fields = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**fields, **changes}))


def own_code(folder: Path, *names: str, kind: str = "llama", source: str = "model") -> Path:
    """A model folder in which the files of these names point to code; returns what that code would write."""
    shutil.copytree(original(source), folder)
    marker = folder.parent / "ran"
    code = CODE.format(marker=str(marker), kind=kind)
    (folder / "own.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        code + "\n\ndef generate(model, **options):\n    return 1\n"
    )
    for name in names:
        settings_in(folder / name, auto_map=MAPS[name], **CLASSES.get(name, {}))
    settings_in(folder / "config.json", model_type=kind)
    return marker


def quantize(folder: Path, **options: Any) -> None:
    run = AutoRound(str(folder), iters=0, disable_opt_rtn=True, group_size=32, show_progress=False, **options)
    run.quantize_and_save(str(folder.parent / "out"))


USES: dict[str, Callable[[Path], Any]] = {
    "AutoRound": quantize,
    "quantize": lambda f: command(f, "--iters", 0, "--disable_opt_rtn", "--group_size", 32, "--output_dir", f.parent),
    "plan": lambda f: command("plan", f, "--group_size", 32),
    "doctor": lambda f: command("doctor", f),
    "doctor --scaffold": lambda f: command("doctor", f, "--scaffold", "--output", f.parent / "out"),
    "verify": lambda f: command("verify", f),
    "verify --against": lambda f: command("verify", original("W4A16"), "--against", f),
    "eval": lambda f: command("eval", f, "--device", "cpu", "--windows", 1, "--seqlen", 16),
    "eval --against": lambda f: command("eval", original("model"), "--against", f, "--windows", 1, "--seqlen", 16),
    "export --model": lambda f: command("export", work(), "--model", f, "--output_dir", f.parent / "out"),
    "load_config": load_config,
    "load_model": load_model,
    "load_tokenizer": load_tokenizer,
    "load_processor": load_processor,
}


def work() -> Path:
    original("work")
    return next(path.parent for path in (original("model").parents[1] / "made" / "work").glob("*.work/*/run.json"))


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("kind", ["llama", "own_llama"])
def test_code_of_a_folder_is_not_run(tmp_path: Path, use: Callable[[Path], Any], kind: str, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    marker = own_code(tmp_path / "model", *MAPS, kind=kind)
    said = ""
    try:
        use(tmp_path / "model")
    except (ValueError, OSError, RuntimeError) as error:
        said = str(error)
    assert not marker.exists()
    assert not said or f"{TRUST}=True (--{TRUST})" in said or "work folder" in said or "differ" in said, said


def test_code_of_a_folder_is_run_if_trusted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    marker = own_code(tmp_path / "model", "config.json", "tokenizer_config.json", kind="trusted_llama")
    quantize(tmp_path / "model", trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize("use", [load_tokenizer, load_processor, load_config])
def test_each_kind_of_code_would_be_run_if_trusted(tmp_path: Path, use: Callable[..., Any], monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    marker = own_code(tmp_path / f"model_{use.__name__}", *MAPS, kind="own_llama")
    with contextlib.suppress(ValueError):  # the processor of the test is not complete
        use(tmp_path / f"model_{use.__name__}", trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_of_the_hub_are_not_asked_for(tmp_path: Path, key: str):
    own_code(tmp_path / "model")
    settings_in(tmp_path / "model" / "config.json", **{key: "somebody/kernel"})
    for use in (load_config, load_model):
        with pytest.raises(CheckpointError, match=r"config\.json asks for code from the hub .*'somebody/kernel'"):
            use(tmp_path / "model")


def test_nested_configurations_bring_no_code_either(tmp_path: Path):
    own_code(tmp_path / "model")
    text = json.loads((original("model") / "config.json").read_text())
    tower = {"model_type": "own_tower", "auto_map": {"AutoModel": "own.OwnModel"}}
    fields = {"model_type": "llava", "text_config": text, "vision_config": tower}
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="brings its own code"):
        load_config(tmp_path / "model")


# ---- pickles -----------------------------------------------------------------------------------------------------


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.write_text, (self.marker, "ran")


def bomb(file: Path) -> Path:
    marker = file.parent.parent / "unpickled"
    torch.save({"x": Bomb(marker)}, file)
    with open(file.with_suffix(".pkl"), "wb") as handle:
        pickle.dump(Bomb(marker), handle)
    return marker


@pytest.mark.parametrize("use", ["AutoRound", "plan", "load_model", "verify", "eval", "verify --against"])
@pytest.mark.parametrize("beside", [True, False])
def test_pickles_are_not_opened(tmp_path: Path, use: str, beside: bool):
    folder = tmp_path / "model"
    own_code(folder)
    marker = bomb(folder / "pytorch_model.bin")
    shutil.copy(folder / "pytorch_model.bin", folder / "training_args.bin")
    if beside:
        USES[use](folder)
    else:
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"pickled weights only .*convert them first"):
            USES[use](folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["data.pt", "data.pkl", "data.bin"])
def test_pickled_data_sets_are_not_opened(tmp_path: Path, name: str):
    (tmp_path / "data").mkdir()
    marker = bomb(tmp_path / "data" / name)
    for dataset in (tmp_path / "data" / name, tmp_path / "data"):
        with pytest.raises(ValueError, match="data"):
            build_calibration(str(dataset), load_tokenizer(original("model")), seqlen=16, nsamples=1)
    assert not marker.exists()


# ---- links -------------------------------------------------------------------------------------------------------


def hub_snapshot(cache: Path, kind: str) -> Path:
    """A folder as the hub's cache holds it: links to blobs beside it."""
    snapshot, blobs = cache / "models--a--b" / "snapshots" / "0123", cache / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(original(kind).iterdir())):
        shutil.copy(file, blobs / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob{number}")
    return snapshot


@pytest.mark.parametrize("kind", ["model", "shards"])
@pytest.mark.parametrize("moved", [False, True])
def test_links_of_a_hub_cache_are_followed(tmp_path: Path, kind: str, moved: bool):
    snapshot = hub_snapshot(tmp_path / "disk", kind)
    if moved:
        (tmp_path / "hub").symlink_to(tmp_path / "disk")
        snapshot = tmp_path / "hub" / snapshot.relative_to(tmp_path / "disk")
    assert Checkpoint(snapshot).names() == Checkpoint(original(kind)).names()
    assert load_model(snapshot).config.hidden_size == 32
    USES["AutoRound"](snapshot)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_weights_may_be_links(tmp_path: Path, name: str):
    """People share large files between folders; whatever is linked is only ever read as tensors."""
    kind = "shards" if "of" in name else "model"
    shutil.copytree(original(kind), tmp_path / "model")
    file = next((tmp_path / "model").glob("model*.safetensors"))
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    assert Checkpoint(tmp_path / "model").names() == Checkpoint(original(kind)).names()
    USES["AutoRound"](tmp_path / "model")


@pytest.mark.parametrize("name", ["vocab.txt", "sub/vocab.txt", "folder"])
def test_other_files_that_are_links_out_of_the_folder_are_not_copied(tmp_path: Path, name: str):
    shutil.copytree(original("model"), tmp_path / "model")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    link = tmp_path / "model" / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "private" / ("" if name == "folder" else "key"))
    for use in (USES["AutoRound"], USES["plan"], USES["verify --against"]):
        with pytest.raises(CheckpointError, match=f"{name} is a link out of its folder"):
            use(tmp_path / "model")


def test_links_within_a_folder_stay_inside(tmp_path: Path):
    (tmp_path / "model" / "real").mkdir(parents=True)
    (tmp_path / "model" / "real" / "x").touch()
    (tmp_path / "model" / "x").symlink_to("real/x")
    assert stays_inside(tmp_path / "model" / "x", tmp_path / "model")


# ---- templates and tokenizers ------------------------------------------------------------------------------------

TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('no') }}",
    "{{ 1 // 0 }}",
    "{% if %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_are_rendered_in_a_sandbox(tmp_path: Path, template: str):
    shutil.copytree(original("model"), tmp_path / "model")
    settings_in(
        tmp_path / "model" / "tokenizer_config.json", chat_template=template.replace("MARKER", str(tmp_path / "ran"))
    )
    data = [{"messages": [{"role": "user", "content": "the quick brown fox"}]}]
    with pytest.raises(CalibrationDataError, match="chat template refuses this conversation"):
        build_calibration(data, load_tokenizer(tmp_path / "model"), seqlen=4, nsamples=1, apply_chat_template=True)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_with_a_slow_expression_is_named(tmp_path: Path):
    shutil.copytree(original("model"), tmp_path / "model")
    split = {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False}
    settings_in(tmp_path / "model" / "tokenizer.json", pre_tokenizer=split)
    with pytest.raises(CheckpointError, match=r"the tokenizer, on .*retry-limit-in-match"):
        build_calibration(["a" * 60 + "!"], load_tokenizer(tmp_path / "model"), seqlen=4, nsamples=1)
