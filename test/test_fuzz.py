"""A few damages of every kind of file, the same each time; `python test/fuzz.py --minutes 10` tries many."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fuzz import TARGETS, command, examples, original
from hostile_files import ODD, changed
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTJConfig

from auto_round import AutoRound
from auto_round.calibration.grammar import parse_sources
from auto_round.cli.main import _explain
from auto_round.cli.parser import layer_config
from auto_round.formats import format_name
from auto_round.formats.writer import parse_size
from auto_round.modeling.checkpoint import CheckpointError
from auto_round.schemes import QuantizationScheme, parse_scheme
from auto_round.utils.model import build_empty

SLOW = ("quantize", "doctor", "eval", "plan", "against", "export", "generation")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_are_used_or_refused_in_words(target: str):
    examples(target, 4 if any(word in target for word in SLOW) else 7, derandomize=True)()


# ---- words on the command line -----------------------------------------------------------------------------------

RULES = {"k_proj": {"bits": 8, "group_size": 32}, "lm_head": "W8A16", "model.layers.0.mlp": {"bits": 4}}
WORDS = st.text(alphabet="Ww48aA16gG32:,={}[]()\"'\\/.*+?_-é\x00 nul", max_size=20)


@pytest.mark.parametrize("parse", [layer_config, parse_scheme, parse_sources, format_name, parse_size])
@pytest.mark.filterwarnings("ignore")
def test_any_word_is_understood_or_refused_in_words(parse: Callable[[str], Any]):
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.one_of(WORDS, changed(RULES).map(json.dumps), st.just("{a:" * 3000), st.just("[" * 100_000)))
    def run(word: str) -> None:
        try:
            parse(word)
        except Exception as error:
            assert "--debug" not in _explain(error, False)[0], repr(error)
            assert not isinstance(error, UnicodeError)

    run()


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(changed(RULES))
@pytest.mark.filterwarnings("ignore")
def test_any_rules_for_layers_are_followed_or_refused(rules: Any):
    if isinstance(rules, dict):
        try:
            AutoRound(str(original("model")), layer_config=rules, iters=0, group_size=32, show_progress=False)
        except Exception as error:
            assert "--debug" not in _explain(error, False)[0], repr(error)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.sampled_from([*QuantizationScheme.__dataclass_fields__]), ODD, max_size=4))
def test_any_fields_are_a_scheme_or_refused(fields: dict[str, Any]):
    try:
        parse_scheme("W4A16", **fields)
    except Exception as error:
        assert "--debug" not in _explain(error, False)[0], repr(error)


# ---- sizes -------------------------------------------------------------------------------------------------------


def test_tables_that_no_model_has_are_not_computed():
    import torch

    build_empty(GPTJConfig(n_layer=1, n_positions=1 << 16, n_embd=64, n_head=2, rotary_dim=16), torch.float32)
    with pytest.raises(CheckpointError, match=r"a tensor of shape \[.*GiB, as no model does"):
        build_empty(GPTJConfig(n_layer=1, n_positions=1 << 29, n_embd=64, n_head=2, rotary_dim=16), torch.float32)


def test_parameters_take_no_memory_before_they_are_read():
    import torch

    config = GPTJConfig(n_layer=1, n_embd=1 << 20, n_head=2, rotary_dim=16, n_positions=64)
    assert build_empty(config, torch.float32).transformer.h[0].mlp.fc_in.weight.numel() == 1 << 42


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10**6), ("hidden_size", 10**9), ("x", 10**30)])
def test_sizes_that_no_model_has_are_refused(tmp_path, key: str, value: int):
    fields = json.loads((original("model") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, key: value}))
    with pytest.raises(CheckpointError, match=f"{key} is {value}, which no model has"):
        command("plan", tmp_path)
