"""Files that are damaged, foreign or made to do harm are refused, quickly, by an error that names what is wrong."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_foreign import AWQ, GPTQ, edit, foreign, needs_distribution
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoRoundConfig

from auto_round.inference.checks import check_config
from auto_round.inference.convert_model import get_layer_config
from auto_round.modeling.checkpoint import CheckpointError
from auto_round.plan import PlanError, match_layers
from auto_round.utils.patterns import PatternError, Patterns, match, search
from auto_round.verify.artifact import Artifact
from auto_round.verify.finished import verify_artifact

LAYER = "model.layers.0.mlp.up_proj"
LONG = "model.layers.0." + "a" * 300 + "!"


# ---- expressions -------------------------------------------------------------------------------------------------

SLOW = ["(a|a)*$", "(a|aa)+$", "(.*a){20}x", "(?R)?a", "((a{1,99}){1,99})*$"]
LARGE = ["a{4000000000}", "((a{999}){999}){999}", "(?:" * 40 + "a" + "){99}" * 40, "a" * 20_000, "(?x)a{9 #\n99999999}"]
INVALID = ["*down", "(", "[z-a]", "(" * 5000 + ")" * 5000, r"\p{Nothing}", "(?P<n>a)(?P<n"]


@pytest.mark.parametrize("pattern", ["(a+)+$", *SLOW, *LARGE, *INVALID], ids=lambda pattern: pattern[:20])
def test_one_search_returns_or_refuses_within_a_second(pattern: str):
    start = time.process_time()
    try:
        assert search(pattern, LONG) is False
    except PatternError as error:
        assert repr(pattern)[1:20] in str(error) and len(str(error)) < 1000
    else:
        assert pattern not in (*SLOW, *LARGE, *INVALID)
    assert time.process_time() - start < 1


def test_many_searches_share_their_time():
    patterns, start = Patterns("config.json"), time.process_time()
    with pytest.raises(PatternError, match=r"config\.json: the regular expression .* takes too long on 'a+!'"):
        for count in range(100_000):  # each alone is quick enough
            patterns.search("(a|a)*$", "a" * (13 + count % 2) + "!")
    assert time.process_time() - start < 5


def test_ordinary_searches_spend_nothing():
    patterns = Patterns("config.json")
    for index in range(20_000):
        assert patterns.search(r".*layers\.\d+\.mlp\.(up|gate)_proj$", f"model.layers.{index}.mlp.up_proj")


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab.*+?()[]{}|^$\\0123,", max_size=12), st.text(alphabet="ab.0", max_size=12))
def test_any_text_is_an_expression_or_a_named_error(pattern: str, name: str):
    try:
        assert isinstance(search(pattern, name), bool) and (search(pattern, name) or not match(pattern, name))
    except PatternError as error:
        assert repr(pattern) in str(error)


def test_rules_of_people_are_limited_too():
    with pytest.raises(PlanError, match="takes too long"):
        match_layers("(a|a)*$", [LONG])
    with pytest.raises(PlanError, match=r"the layer pattern .*: invalid regular expression"):
        match_layers("(up", ["up"])


@pytest.mark.parametrize(
    "settings",
    [
        {"extra_config": {"(a|a)*$": {"bits": 8}}},
        {"dynamic": {"-:model\\.layers\\.0\\.(a|a)*$": {}}},
        {"modules_to_not_convert": ["(a|a)*$"]},
        {"modules_in_block_to_quantize": [["(a|a)*$"]]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_expressions_of_configs_are_limited(settings: dict[str, Any]):
    block = torch.nn.ModuleDict({"a" * 60 + "!" * count: torch.nn.Linear(32, 32) for count in (1, 2)})
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([block])})})
    with pytest.raises(
        ValueError, match=r"quantization_config: the regular expression '.*\(a\|a\)\*\$' takes too long"
    ):
        get_layer_config(model, {"bits": 4, "block_name_to_quantize": "model.layers", **settings})


# ---- files -------------------------------------------------------------------------------------------------------


def load(folder: Path, auto_class: Any = AutoModelForCausalLM) -> Any:
    return auto_class.from_pretrained(folder, dtype=torch.float32, quantization_config=AutoRoundConfig())


def retensor(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """A damage that works on the tensors by name."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def without(name: str) -> Callable[[Path], None]:
    return retensor(lambda tensors: tensors.pop(name))


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return retensor(lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))


def poisoned(name: str, value: float) -> Callable[[Path], None]:
    return changed(name, lambda tensor: tensor.index_fill(0, torch.tensor([0]), value))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **changes)


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def header_of(length: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])

    return damage


def entries(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A damage that works on the header of the file."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        raw = file.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        text = change(header) or json.dumps(header)
        file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + raw[8 + length :])

    return damage


def entry(**changes: Any) -> Callable[[Path], None]:
    return entries(lambda header: header["model.norm.weight"].update(changes))


def indexed(shard: str, also: dict[str, str] | None = None) -> Callable[[Path], None]:
    """Give the file another name, and an index that says where tensors are."""

    def damage(folder: Path) -> None:
        names = load_file(folder / "model.safetensors").keys()
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        index = {"metadata": {}, "weight_map": {**dict.fromkeys(names, shard), **(also or {})}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


FILE = r"model\.safetensors"
UP = r"model\.layers\.0\.mlp\.up_proj"
# What is damaged → (how, what the loader says, whether `auto-round verify` can know without a model)
DAMAGES: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "truncated": (truncated, rf"{FILE} is truncated.*download it again", True),
    "huge header": (header_of(1 << 62), rf"{FILE} is truncated or no safetensors file", True),
    "large header": (header_of(99_000_000), rf"{FILE} is truncated or no safetensors file", True),
    "header of one name twice": (
        entries(lambda header: '{"x": 1, "x": 2, ' + json.dumps(header)[1:]),
        rf"{FILE}: unreadable safetensors header \(a name is there twice",
        True,
    ),
    "header a list": (entries(lambda header: json.dumps([header])), rf"{FILE}: its safetensors header is no map", True),
    "header deep": (entries(lambda header: "[" * 10**5 + "]" * 10**5), rf"{FILE}: unreadable safetensors header", True),
    "shared bytes": (
        entries(lambda header: header.update({f"x{n}": header["model.norm.weight"] for n in range(3)})),
        rf"{FILE}: '.*' and '.*' share bytes",
        True,
    ),
    "negative offset": (entry(data_offsets=[-512, 0]), rf"{FILE}: .* has sizes that no file has", True),
    "offsets of floats": (entry(data_offsets=[0.0, 512.0]), rf"{FILE}: .* has sizes that no file has", True),
    "sizes that overflow": (entry(shape=[2**32, 2**32, 0]), rf"{FILE}: .* does not fill its", True),
    "larger than the file": (
        entry(shape=[2**40], data_offsets=[0, 2**42]),
        rf"{FILE} is truncated: 'model\.norm\.weight' ends at byte",
        True,
    ),
    "unknown dtype": (entry(dtype="F5"), rf"{FILE}: the header entry of .* cannot be read", True),
    "shard outside": (indexed("../../one.safetensors"), r"shard outside its folder: '\.\./\.\./one", True),
    "shard of a root": (indexed("/etc/one.safetensors"), "shard outside its folder", True),
    "shard missing": (indexed("one.safetensors", {"x": "two.safetensors"}), r"shard two\.safetensors .* missing", True),
    "tensor not in shard": (indexed("one.safetensors", {"x": "one.safetensors"}), r"index.* 'x'|about x", True),
    "no qzeros": (without(f"{LAYER}.qzeros"), f"{UP} has no qzeros", True),
    "no scales": (without(f"{LAYER}.scales"), f"{UP} has no scales", True),
    "no qweight": (without(f"{LAYER}.qweight"), rf"no usable tensor {UP}\.qweight", False),
    "no norm": (without("model.norm.weight"), r"has no model\.norm\.weight, .* random", False),
    "no lm_head": (without("lm_head.weight"), r"has no lm_head\.weight, .* random", False),
    "qweight short": (changed(f"{LAYER}.qweight", lambda t: t[:-4]), rf"{UP}\.qweight has shape \[12, 256\]", True),
    "scales short": (changed(f"{LAYER}.scales", lambda t: t[:1]), rf"{UP}\.\w+ has shape", True),
    "qzeros wide": (changed(f"{LAYER}.qzeros", lambda t: t.repeat(1, 2)), rf"{UP}\.qzeros has shape \[2, 64\]", True),
    "scales flat": (changed(f"{LAYER}.scales", lambda t: t.flatten()), f"tensors of {UP} have shapes", True),
    "g_idx short": (changed(f"{LAYER}.g_idx", lambda t: t[:5]), rf"{UP}\.g_idx has shape \[5\]", False),
    "g_idx beyond": (poisoned(f"{LAYER}.g_idx", 99), rf"{UP}\.g_idx names groups beyond its 2", False),
    "g_idx negative": (poisoned(f"{LAYER}.g_idx", -1), rf"{UP}\.g_idx names groups beyond its 2", False),
    "qweight floats": (changed(f"{LAYER}.qweight", torch.Tensor.float), rf"{UP}\.qweight holds float32, not int", True),
    "scales ints": (changed(f"{LAYER}.scales", torch.Tensor.int), rf"{UP}\.scales holds int32, not", True),
    "scales NaN": (poisoned(f"{LAYER}.scales", float("nan")), rf"{UP}\.scales holds NaN or Inf", True),
    "scales Inf": (poisoned(f"{LAYER}.scales", float("inf")), rf"{UP}\.scales holds NaN or Inf", True),
    "norm shape": (
        changed("model.norm.weight", lambda t: t[:9]),
        r"model\.norm\.weight has shape \[9\], .* \[128\]",
        False,
    ),
    "wrong bits": (config(bits=8), r"_proj\.qweight has shape .* 8 bits .*looks like 4 bits", True),
    "wrong group": (config(group_size=32), r"_proj\.\w+ has shape .* groups of 32", True),
    "odd group": (config(group_size=48), "group size 48 of .* does not divide|has shape .* groups of 48", True),
    "kept but packed": (config(dynamic={f"-:{UP}": {}}), f"{UP} is packed, but", True),
    "unknown packing": (config(quant_method="auto-round", packing_format="zip"), "unknown packing format 'zip'", True),
    "extra_config list": (config(extra_config=[LAYER]), "extra_config must map layers to settings, not be list", True),
    "extra_config number": (config(extra_config={LAYER: 8}), r"extra_config\['model\..*must be settings", True),
    "extra_config embedding": (
        config(extra_config={"model.embed_tokens": {"bits": 4}}),
        r"extra_config quantizes model\.embed_tokens, but a Embedding",
        False,
    ),
}


def small() -> Any:
    from tiny import tiny_llama

    return tiny_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=1)


@needs_distribution
@pytest.mark.parametrize(("damage", "message", "_known"), DAMAGES.values(), ids=DAMAGES)
def test_the_loader_refuses(tmp_path: Path, damage: Callable[[Path], None], message: str, _known: bool):
    foreign(tmp_path, GPTQ, small)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(damage, message) for damage, message, known in DAMAGES.values() if known],
    ids=[name for name, (_, _, known) in DAMAGES.items() if known],
)
def test_the_check_of_a_folder_says_the_same(tmp_path: Path, damage: Callable[[Path], None], message: str):
    foreign(tmp_path, GPTQ, small)
    assert verify_artifact(tmp_path).passed
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        result = verify_artifact(tmp_path)
        raise CheckpointError(next((check.detail for check in result.checks if not check.passed), "all passed"))


@needs_distribution
def test_act_order_and_second_layouts_pass_the_check(tmp_path: Path):
    for name, config in {
        "a": {**GPTQ, "desc_act": True},
        "v": {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
    }.items():
        dense = foreign(tmp_path / name, config, small, reordered=name == "a")
        assert verify_artifact(tmp_path / name).passed
        read = Artifact.open(tmp_path / name).weight(LAYER)
        assert torch.equal(read, dense.get_submodule(LAYER).weight)


def test_unknown_methods_are_named(tmp_path: Path):
    foreign(tmp_path, GPTQ, small)
    edit(tmp_path, quant_method="auto-roundest")
    result = verify_artifact(tmp_path)
    assert not result.passed and "quant_method 'auto-roundest'" in result.checks[0].detail
    with pytest.raises(ValueError, match="AWQ's layout 'gemv': only 'gemm'"):
        check_config({**AWQ, "version": "gemv"})


@needs_distribution
def test_parts_and_new_heads_may_be_loaded(tmp_path: Path):
    dense = foreign(tmp_path, GPTQ, small)
    part = load(tmp_path, AutoModel)
    assert torch.equal(part.layers[0].mlp.up_proj.weight, dense.get_submodule(LAYER).weight)
    assert load(tmp_path, AutoModelForSequenceClassification).score.weight.isfinite().all()
    without("model.norm.weight")(tmp_path)
    with pytest.raises(ValueError, match=r"has no model\.norm\.weight"):
        load(tmp_path, AutoModelForSequenceClassification)
    with pytest.raises(ValueError, match=r"has no norm\.weight"):
        load(tmp_path, AutoModel)


@needs_distribution
def test_a_module_in_extra_config_means_its_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    foreign(tmp_path, {**GPTQ, "extra_config": {"model.layers.0.mlp": {"bits": 16}}}, small, kept=("lm_head", "mlp"))
    load(tmp_path)
    edit(tmp_path, extra_config={"model.layers.0.mlp": {"bits": 16}, "model.layers.7.nothing": {"bits": 8}})
    load(tmp_path)
    assert "extra_config quantizes model.layers.7.nothing, which means no layer" in caplog.text
