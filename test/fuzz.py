"""Fuzzing of every kind of file that is read, through every entry point: `python test/fuzz.py --minutes 10 [TARGET …]`.

`test_fuzz.py` runs the same targets for a few examples each. A finding is printed with the smallest damage that
hypothesis could reduce it to.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import io
import itertools
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostile_files import changed, damaged_bytes, json_bytes, safetensors_bytes, watched
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

TYPES = ("llama", "qwen3_moe", "gemma3", "mamba2", "deepseek_v3", "llava", "whisper", "gptj", "t5")
NUMBER = itertools.count()
MADE = {  # folder → (scheme, format)
    "W4A16": ("W4A16", None),
    "MXFP4": ("MXFP4", None),
    "FP8_BLOCK": ("FP8_BLOCK", None),
    "gptq": ("W4A16", "auto_gptq"),
    "mlx": ("W4A16", "mlx"),
    "packed": ("W4A16", "llm_compressor"),
    "fp8": ("FP8_BLOCK", "fp8"),
    "gguf": ("GGUF:Q8_0", "gguf:q8_0"),
    "work": ("W4A16", None),
}
LOADED, CHECKED, SOURCES = (
    ("W4A16", "MXFP4", "FP8_BLOCK", "gptq"),
    ("W4A16", "MXFP4", "FP8_BLOCK", "mlx", "packed", "fp8"),
    ("packed", "fp8"),
)


@dataclass(frozen=True)
class Target:
    """A file of a folder, how it is damaged, and what is done with the folder."""

    folder: str
    file: str
    damage: Callable[[bytes], st.SearchStrategy[bytes]]
    use: Callable[[Path], Any]


# ---- folders -----------------------------------------------------------------------------------------------------


@functools.cache
def home() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="auto_round_fuzz_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def original(kind: str) -> Path:
    """A healthy folder, made once."""
    from tiny import save_tiny, tiny_llama

    folder = home() / "healthy" / kind.replace("/", "_")
    if kind in ("model", "shards", "wide"):
        width = 128 if kind == "wide" else 32
        small = tiny_llama(
            num_hidden_layers=1,
            hidden_size=width,
            intermediate_size=2 * width,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        save_tiny(small, folder, shard="40KB" if kind == "shards" else "5GB")
        file = folder / "tokenizer_config.json"
        template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
        return folder
    if kind.startswith("type "):
        from transformers import CONFIG_MAPPING

        from auto_round.doctor.tiny import tiny_config

        folder.mkdir(parents=True)
        tiny_config(CONFIG_MAPPING[kind.removeprefix("type ")]()).save_pretrained(folder)
        return folder
    if kind.startswith("file "):
        folder.mkdir(parents=True)
        found = json.loads(Path(kind.removeprefix("file ")).read_text())
        (folder / "config.json").write_text(json.dumps(found.get("config", found)))
        return folder
    if kind == "data":
        folder.mkdir(parents=True)
        records = [{"text": f"the quick brown fox {n} " * 40, "kind": "prose"} for n in range(4)]
        chats = [{"messages": [{"role": "user", "content": "the lazy dog " * 50}]} for _ in range(4)]
        (folder / "text.jsonl").write_text("\n".join(map(json.dumps, records)))
        (folder / "text.json").write_text(json.dumps(records))
        (folder / "chat.json").write_text(json.dumps(chats))
        (folder / "text.txt").write_text("\n\n".join(record["text"] for record in records))
        return folder
    return _quantized(kind, folder)


def _quantized(kind: str, folder: Path) -> Path:
    """A written folder, or the work folder of its run."""
    from auto_round import AutoRound

    scheme, form = MADE[kind]
    groups = {"group_size": 32} if scheme == "W4A16" else {}
    run = AutoRound(
        str(original("wide" if kind == "fp8" else "model")),
        scheme=scheme,
        iters=0,
        disable_opt_rtn=True,
        show_progress=False,
        **groups,
    )
    _, written = run.quantize_and_save(str(home() / "made" / kind), format=form)
    source = next(Path(f"{written}.work").iterdir()) if kind == "work" else Path(written)
    shutil.copytree(source, folder)
    return folder


def fresh(kind: str) -> Path:
    original(kind)
    name = next(Path(home() / "made").glob("work/*.work/*")).name if kind == "work" else "subject"
    folder = home() / f"case{next(NUMBER)}" / name
    shutil.copytree(original(kind), folder)
    return folder


# ---- what is done with a folder ----------------------------------------------------------------------------------


def command(*arguments: Any) -> None:
    """A command line; what it would print as a crash is one."""
    from auto_round.cli.main import _dispatch, _explain

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            _dispatch([str(argument) for argument in arguments], "default", False)
        except SystemExit:
            pass
        except Exception as error:
            if "--debug" in _explain(error, False)[0]:
                raise RuntimeError(f"shown as a crash: {type(error).__name__}: {error}") from error
            raise


def quantize(folder: Path, **options: Any) -> None:
    from auto_round import AutoRound

    settings = {"iters": 0, "disable_opt_rtn": True, "nsamples": 1, "seqlen": 16, "show_progress": False, **options}
    AutoRound(str(folder), group_size=32, **settings).quantize_and_save(str(folder.parent / "out"))


def build(folder: Path) -> None:
    from auto_round import AutoRound

    AutoRound(str(folder), iters=0, group_size=32, show_progress=False)


def load(folder: Path) -> None:
    from auto_round.inference.load import load_model

    load_model(folder)


def build_empty(folder: Path) -> None:
    """The module tree of a configuration."""
    import torch

    from auto_round.modeling.blocks import find_stacks
    from auto_round.utils import model

    find_stacks(model.build_empty(model.load_config(folder), torch.float32))


def load_directly(folder: Path) -> None:
    """As people do; only what this package is given to load is its business."""
    from transformers import AutoModelForCausalLM

    try:
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    except Exception as error:
        trace = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if any("/auto_round/" in name for name in trace):
            raise


def plan(folder: Path) -> None:
    command("plan", folder, "--group_size", 32, "--output_dir", folder.parent / "out")


def calibrate(file: Path, **options: Any) -> None:
    from auto_round.calibration.data import build_calibration

    build_calibration(str(file), _tokenizer(), seqlen=16, nsamples=2, holdout=1, **options)


@functools.cache
def _tokenizer() -> Any:
    from auto_round.utils.model import load_tokenizer

    return load_tokenizer(original("model"))


def verify(folder: Path) -> None:
    command("verify", folder)


def verify_against(folder: Path) -> None:
    command("verify", original("W4A16"), "--against", folder)


def export(folder: Path) -> None:
    command("export", folder, "--format", "fake", "--output_dir", folder.parent / "out" / "x")


def evaluate(folder: Path) -> None:
    command("eval", folder, "--windows", 1, "--seqlen", 16, "--device", "cpu")


def doctor(folder: Path) -> None:
    command("doctor", folder / "config.json")


def tokenize(folder: Path) -> None:
    from auto_round.calibration.data import build_calibration
    from auto_round.utils.model import load_tokenizer

    chat = [{"messages": [{"role": "user", "content": "the lazy dog " * 50}]}]
    tokenizer = load_tokenizer(folder)
    build_calibration(chat, tokenizer, seqlen=16, nsamples=1, apply_chat_template=True)


# ---- the targets -------------------------------------------------------------------------------------------------


def settings_file(raw: bytes) -> st.SearchStrategy[bytes]:
    return json_bytes(json.loads(raw))


def quantization(raw: bytes) -> st.SearchStrategy[bytes]:
    """Only quantization_config changes."""
    config = json.loads(raw)
    return changed(config["quantization_config"]).map(
        lambda found: json.dumps({**config, "quantization_config": found}).encode()
    )


def lines(raw: bytes) -> st.SearchStrategy[bytes]:
    """One line of JSON is damaged, or all of the file."""
    first, _, rest = raw.partition(b"\n")
    return st.one_of(json_bytes(json.loads(first)).map(lambda line: line + b"\n" + rest), damaged_bytes(raw))


def several(raw: bytes) -> st.SearchStrategy[bytes]:
    return json_bytes(json.loads(raw)) | st.just(b"[]") | st.just(b'{"text": []}')


CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TARGETS: dict[str, Target] = {
    "config, AutoRound": Target("model", CONFIG, settings_file, build),
    "config, quantize": Target("model", CONFIG, settings_file, quantize),
    "config, plan": Target("model", CONFIG, settings_file, plan),
    "config, load": Target("model", CONFIG, settings_file, load),
    "config, eval": Target("model", CONFIG, settings_file, evaluate),
    "config, doctor": Target("model", CONFIG, settings_file, doctor),
    "config, against": Target("model", CONFIG, settings_file, verify_against),
    "index, AutoRound": Target("shards", INDEX, settings_file, build),
    "index, plan": Target("shards", INDEX, settings_file, plan),
    "index, load": Target("shards", INDEX, settings_file, load),
    "header, AutoRound": Target("model", WEIGHTS, safetensors_bytes, build),
    "header, load": Target("model", WEIGHTS, safetensors_bytes, load),
    "header, verify": Target("W4A16", WEIGHTS, safetensors_bytes, verify),
    "header, verify float": Target("FP8_BLOCK", WEIGHTS, safetensors_bytes, verify),
    "tokenizer, AutoRound": Target("model", "tokenizer.json", settings_file, tokenize),
    "tokenizer config": Target("model", "tokenizer_config.json", settings_file, tokenize),
    "tokenizer config, plan": Target("model", "tokenizer_config.json", settings_file, plan),
    "generation config": Target("model", "generation_config.json", settings_file, quantize),
    "jsonl": Target("data", "text.jsonl", lines, lambda folder: calibrate(folder / "text.jsonl")),
    "json": Target("data", "text.json", several, lambda folder: calibrate(folder / "text.json")),
    "chat": Target(
        "data", "chat.json", several, lambda folder: calibrate(folder / "chat.json", apply_chat_template=True)
    ),
    "txt": Target("data", "text.txt", damaged_bytes, lambda folder: calibrate(folder / "text.txt")),
    "gguf, verify": Target("gguf", "*.gguf", damaged_bytes, verify),
    "gguf, eval": Target("gguf", "*.gguf", damaged_bytes, evaluate),
    "run.json, export": Target("work", "run.json", settings_file, export),
    "block, export": Target("work", "*layers*.safetensors", safetensors_bytes, export),
    "report, verify": Target("W4A16", "report.json", settings_file, verify),
    "report, export": Target("W4A16", "report.json", settings_file, export),
    **{f"config of {kind}": Target(f"type {kind}", CONFIG, settings_file, build_empty) for kind in TYPES},
    **{f"{kind}, load": Target(kind, CONFIG, quantization, load) for kind in LOADED},
    **{f"{kind}, from_pretrained": Target(kind, CONFIG, quantization, load_directly) for kind in LOADED},
    **{f"{kind}, verify": Target(kind, CONFIG, quantization, verify) for kind in CHECKED},
    **{f"{kind}, source": Target(kind, CONFIG, quantization, build) for kind in SOURCES},
}


def examples(name: str, count: int, **options: Any) -> Callable[[], None]:
    """A function that tries a target on so many damages."""
    target = TARGETS[name]
    file = next(original(target.folder).glob(target.file))

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        **options,
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        data_bytes = data.draw(target.damage(file.read_bytes()))
        folder = fresh(target.folder)
        try:
            (folder / file.name).write_bytes(data_bytes)
            watched(lambda: target.use(folder), folder)
        finally:
            shutil.rmtree(folder.parent, ignore_errors=True)

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--examples", type=int, default=25, help="examples of a target at a time")
    parser.add_argument("--configs", type=Path, metavar="DIR", help="a folder of further config.json files")
    options = parser.parse_args()
    for file in sorted(options.configs.glob("*.json")) if options.configs else ():
        TARGETS[f"config {file.name}"] = Target(f"file {file}", CONFIG, settings_file, build_empty)
    end, found = time.monotonic() + 60 * options.minutes, 0
    for number in itertools.count():
        for name in options.targets or TARGETS:
            if time.monotonic() > end:
                print(f"{found} findings")
                return 1 if found else 0
            try:
                seed(number)(examples(name, options.examples))()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                found += 1
                draw = [note for note in getattr(error, "__notes__", ()) if note.startswith("Draw")]
                cause = error.__cause__ or error
                while cause.__cause__ is not None:
                    cause = cause.__cause__
                frames = traceback.format_list(traceback.extract_tb(cause.__traceback__)[-4:])
                print(f"---- {name}", *draw, f"{type(error).__name__}: {error}", *frames, sep="\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
