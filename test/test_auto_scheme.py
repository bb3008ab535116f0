"""A scheme for each layer within a budget: the solution is exact, what it rests on is true, and runs keep to it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import save_tiny, tiny, tiny_llama, token_ids
from torch.nn import functional

from auto_round import AutoRound, AutoScheme
from auto_round.algorithms.base import oriented
from auto_round.auto_scheme import choose, sensitivity
from auto_round.auto_scheme.budget import bits_of, shared_groups
from auto_round.auto_scheme.solve import BudgetError, solve
from auto_round.auto_scheme.trial import divergences
from auto_round.calibration.native import logits_of
from auto_round.calibration.passes import joined
from auto_round.cli.main import main
from auto_round.cli.quantize import make_parser, settings_for
from auto_round.data_type import data_type
from auto_round.data_type.base import WeightTask
from auto_round.formats.engines import engine
from auto_round.plan import LayerInfo, PlanError, fit_scheme
from auto_round.schemes import SchemeError, parse_scheme
from auto_round.settings import SettingsError
from auto_round.wrapper import quantized_inputs

OPTIONS = "W2A16G32,W4A16G32,W8A16G32"


def make(model, avg_bits=4.0, options=OPTIONS, scheme=None, **changes):
    usual = {"iters": 0, "dataset": token_ids(24), "nsamples": 16, "seqlen": 32, "device_map": "cpu"}
    auto = scheme or AutoScheme(avg_bits, options)
    return AutoRound(str(model), scheme=auto, show_progress=False, **{**usual, **changes})


def report(folder) -> dict:
    return json.loads((Path(folder) / "report.json").read_text())


# ---- the solution ------------------------------------------------------------------------------------------------


def tables(costs, losses):
    row = st.integers(1, 4).flatmap(
        lambda n: st.tuples(st.lists(costs, min_size=n, max_size=n), st.lists(losses, min_size=n, max_size=n))
    )
    return st.lists(row, min_size=1, max_size=5)


@settings(deadline=None, max_examples=300)
@given(tables(st.integers(0, 30), st.floats(0, 1, width=16) | st.floats(0, 1e-6)), st.integers(0, 120))
def test_no_choice_is_better(table, budget):
    costs, losses = [list(row[0]) for row in table], [list(row[1]) for row in table]
    every = [
        (math.fsum(row[one] for row, one in zip(losses, choice, strict=True)), choice)
        for choice in itertools.product(*(range(len(row)) for row in costs))
        if sum(row[one] for row, one in zip(costs, choice, strict=True)) <= budget
    ]
    if not every:
        with pytest.raises(BudgetError):
            solve(costs, losses, budget)
        return
    found = solve(costs, losses, budget)
    assert sum(row[one] for row, one in zip(costs, found, strict=True)) <= budget
    assert math.fsum(row[one] for row, one in zip(losses, found, strict=True)) == pytest.approx(min(every)[0], rel=1e-9)


def test_a_large_model_is_solved_at_once():
    random = np.random.default_rng(0)
    sizes = random.integers(1_000_000, 90_000_000, 560)
    costs = [[int(size * 2.14), int(size * 4.16), int(size * 8.19)] for size in sizes]
    losses = [[scale, scale / 25, scale / 5000] for scale in random.lognormal(0, 2, 560)]
    found = solve(costs, losses, int(3.0 * sizes.sum()))
    spent = sum(row[one] for row, one in zip(costs, found, strict=True))
    assert 0.9999 < spent / (3.0 * sizes.sum()) <= 1


# ---- what it costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("W2A16", 2 + 18 / 128),
        ("W4A16G32", 4 + 20 / 32),
        ("MXFP4", 4.25),
        ("NVFP4", 4.5),
        ("BF16", 16),
        ("GGUF:Q2_K", 2.625),
        ("GGUF:Q3_K", 3.4375),
        ("GGUF:Q4_K", 4.5),
        ("GGUF:Q6_K", 6.5625),
    ],
)
def test_bits_of_a_weight(name, bits):
    info = LayerInfo("a", 256, 512, "b")
    layer = fit_scheme(info, parse_scheme(name), "default")
    assert bits_of(layer) / info.numel == bits
    assert bits_of(layer, codes_only=True) / info.numel == parse_scheme(name).bits


NAMES = [
    f"layers.{i}.{part}"
    for i in range(2)
    for part in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.experts.0.up", "mlp.experts.1.up")
]


def groups(target=None, shared=None):
    auto = AutoScheme(3.0, OPTIONS, shared_layers=shared)
    return [
        [name.removeprefix("layers.0.") for name in group]
        for group in shared_groups(NAMES, auto, target)
        if group[0].startswith("layers.0.") and len(group) > 1
    ]


def test_what_engines_run_as_one_chooses_together():
    experts = ["mlp.experts.0.up", "mlp.experts.1.up"]
    assert groups() == groups(engine("vllm")) == [["attn.q_proj", "attn.k_proj", "attn.v_proj"], experts]
    assert groups(engine("transformers")) == [experts]
    assert groups(engine("transformers"), [["attn.o_proj", "k_proj"]]) == [["attn.k_proj", "attn.o_proj"], experts]
    joined_up = [["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj"], experts]
    assert groups(shared=[["k_proj", "o_proj"]]) == joined_up
    assert sum(map(len, shared_groups(NAMES, AutoScheme(3.0, OPTIONS), None))) == len(NAMES)
    with pytest.raises(PlanError, match="matches no layer"):
        groups(shared=[["q_prj", "k_proj"]])


# ---- what is measured --------------------------------------------------------------------------------------------


def reference(model, plans, batches, seed):
    """The same losses from the whole model's own backward."""
    generator, tokens = torch.Generator().manual_seed(seed), 0
    found = {name: sensitivity.Sums.none(1) for name in plans}

    def watch(name, plan):
        module = model.get_submodule(name)
        weight = oriented(module.weight, plan)
        task = WeightTask(weight, plan.scheme.weight)
        change = data_type("int").quantize(task).dequantize() - weight

        def after(module, args, output):
            moved = functional.linear(args[0].detach(), change)

            def add(g):
                felt = (moved * g).sum(-1)
                found[name].alone[0] += felt.square().sum().item()
                found[name].together[0] += (felt.sum(-1) if felt.dim() > 1 else felt).square().sum().item()

            (output if output.requires_grad else output.requires_grad_()).register_hook(add)

        return module.register_forward_hook(after)

    handles = [watch(name, plan) for name, (plan,) in plans.items()]
    for batch in batches:
        logits = logits_of(model(**batch, use_cache=False)).flatten(0, -2)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        functional.cross_entropy(logits, labels, reduction="sum").backward()
        tokens += len(labels)
    for handle in handles:
        handle.remove()
    factors = sensitivity.coherence(found)
    return {name: factors.get(name.rpartition(".")[2], 1) * sums.alone[0] / 2 / tokens for name, sums in found.items()}


@pytest.mark.parametrize(
    "spec", ["llama", "qwen3_moe", "gemma3_text", "gpt2", "t5:Seq2SeqLM", "bart:Seq2SeqLM", "zamba2"]
)
def test_block_by_block_is_the_whole_models_backward(spec):
    model_type, _, task = spec.partition(":")
    usual = {"dataset": token_ids(4, 16), "nsamples": 4, "seqlen": 16, "amp": False, "show_progress": False}
    model = tiny(model_type, task or "CausalLM")
    run = AutoRound(model, None, scheme=AutoScheme(4.0, OPTIONS), iters=0, **usual)
    run.load_data()
    plans = {name: [plan] for name, plan in run.plan.quantized().items()}
    native = run.observe_original()
    found = sensitivity.measure(run.streamed, plans, run.samples, native, run.amp, search=False, seed=3)
    expected = reference(run.model, plans, joined(run.samples, run.model), seed=3)
    assert len(expected) >= 4 and not found.guessed
    for name, value in expected.items():
        assert found.losses[name][0] == pytest.approx(value, rel=2e-3, abs=1e-13), name
    assert sum(max(row) > 0 for row in found.losses.values()) > len(found.losses) / 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tiny_llama(), tmp_path_factory.mktemp("models") / "tiny")


def test_what_is_expected_is_what_happens(folder):
    """Of one layer rounded alone, and of all: the divergence is as expected."""
    run = make(folder, seqlen=64, dataset=token_ids(24, 64))
    run.load_data()
    plans = {
        name: [fit_scheme(plan.info, scheme, "") for scheme in run.auto.schemes.values()]
        for name, plan in run.plan.quantized().items()
    }
    native = run.observe_original()
    found = sensitivity.measure(run.streamed, plans, run.samples, native, run.amp, search=False, seed=0)
    model = tiny_llama()
    batch = torch.cat(token_ids(32, 64, seed=5))
    with torch.no_grad():
        want = model(batch).logits.log_softmax(-1)
    expected, happened = [], []
    for name, row in found.losses.items():
        for plan, loss in zip(plans[name][:2], row[:2], strict=True):  # of 8 bits, float32 has nothing to say
            weight = model.get_submodule(name).weight
            kept = weight.detach().clone()
            with torch.no_grad():
                weight.copy_(data_type("int").quantize(WeightTask(kept, plan.scheme.weight)).dequantize())
                got = model(batch).logits.log_softmax(-1)
                weight.copy_(kept)
            expected.append(loss)
            happened.append((want.exp() * (want - got)).sum(-1).mean().item())
    assert np.corrcoef(np.log(expected), np.log(happened))[0, 1] > 0.97
    assert sum(happened) / 1.5 < sum(expected) < 1.5 * sum(happened)


@pytest.mark.parametrize("names", ["W2A16G32,W4A16G32", "MXFP4,BF16"])
def test_a_choice_tried_out_is_the_model_so_rounded(folder, names):
    usual = {"dataset": token_ids(4, 16), "nsamples": 4, "seqlen": 16, "amp": False, "disable_opt_rtn": True}
    run = make(folder, options=names, avg_bits=5.0, quant_lm_head=True, **usual)
    run.load_data()
    plans = choose._options(run.plan, run.auto)
    picks = [dict.fromkeys(plans, 0), {name: index % 2 for index, name in enumerate(plans)}]
    found = divergences(run.streamed, plans, picks, run.samples, run.amp, search=False)
    batch = torch.cat(token_ids(4, 16))
    for pick, divergence in zip(picks, found, strict=True):
        model = tiny_llama()
        with torch.no_grad():
            want = model(batch).logits.log_softmax(-1)
            chosen = {name: plans[name][index] for name, index in pick.items()}
            for name, plan in chosen.items():
                if plan.is_quantized:
                    weight = model.get_submodule(name).weight
                    task = WeightTask(weight, plan.scheme.weight)
                    weight.copy_(data_type(plan.scheme.data_type).quantize(task).dequantize())
            with quantized_inputs(model, chosen, {}):
                got = model(batch).logits.log_softmax(-1)
        assert divergence == pytest.approx((want.exp() * (want - got)).sum(-1).mean().item(), rel=1e-3)


def test_the_best_of_those_tried_is_chosen(folder, monkeypatch):
    given = []

    def strange(streamed, options, picks, *args):
        given[:] = picks
        return [1.0, *(0.5 for _ in picks[2:]), 0.25]

    monkeypatch.setattr(choose, "divergences", strange)
    run = make(folder, 3.5, engine="transformers")
    run.choose_schemes()
    assert len(given) > 2 and len({tuple(pick.values()) for pick in given}) == len(given) == run.choice.trials
    assert run.choice.tried == 0.25
    wanted = {name: list(run.auto.schemes.values())[index] for name, index in given[-1].items()}
    assert {name: scheme.bits for name, (scheme, _, _) in run.choice.recipe.items()} == {
        name: scheme.bits for name, scheme in wanted.items()
    }


def test_inputs_that_are_rounded_count(folder):
    run = make(folder, options="MXFP4,MXFP8,NVFP4,FP8_STATIC,BF16", avg_bits=8.0)
    run.choose_schemes()
    weights_alone = make(folder, options=[{"scheme": "MXFP4", "act_bits": 16}, "MXFP8"], avg_bits=4.25)
    weights_alone.choose_schemes()
    both = make(folder, options="MXFP4,MXFP8", avg_bits=4.25)
    both.choose_schemes()
    assert both.choice.predicted > 1.3 * weights_alone.choice.predicted > 0


# ---- runs --------------------------------------------------------------------------------------------------------


def test_a_run_keeps_the_budget_and_says_what_it_chose(folder, tmp_path):
    run = make(folder)
    _, out = run.quantize_and_save(tmp_path)
    assert Path(out).name == "tiny-auto-4bits"
    told, layers = report(out), run.plan.layers
    bits = {name: layer.scheme.bits for name, layer in run.plan.quantized().items()}
    assert len(set(bits.values())) > 1
    total = sum(layers[name].info.numel for name in bits)
    assert sum(bits_of(layers[name]) for name in bits) / total == pytest.approx(
        told["auto_scheme"]["average_bits"], 1e-4
    )
    assert 3.6 < told["auto_scheme"]["average_bits"] <= 4
    for block in ("model.layers.0", "model.layers.1"):
        assert len({bits[f"{block}.self_attn.{part}"] for part in ("q_proj", "k_proj", "v_proj")}) == 1
        assert bits[f"{block}.mlp.gate_proj"] == bits[f"{block}.mlp.up_proj"]
    assert told["auto_scheme"]["predicted_kl"] == pytest.approx(told["auto_scheme"]["measured_kl"], rel=0.5)
    assert {layer["reason"] for layer in told["layers"] if layer["status"] == "quantized"} <= {
        f"AutoScheme: {name}" for name in OPTIONS.split(",")
    }
    assert "Schemes chosen for the layers" in (Path(out) / "report.html").read_text()


def test_more_bits_lose_less(folder):
    expected = []
    for bits in (2.6, 3.5, 4.5, 6.0, 8.75):
        run = make(folder, bits)
        run.choose_schemes()
        expected.append(run.choice.predicted)
    assert expected == sorted(expected, reverse=True) and expected[0] > 20 * expected[-1]


def test_experts_of_a_block_choose_together(tmp_path):
    model = save_tiny(tiny("qwen3_moe"), tmp_path / "moe")
    run = make(model)
    _, out = run.quantize_and_save(tmp_path / "out")
    bits = {name: layer.scheme.bits for name, layer in run.plan.quantized().items()}
    for block in ("model.layers.0", "model.layers.1"):
        assert len({value for name, value in bits.items() if name.startswith(f"{block}.mlp.experts.")}) == 1
    assert len(set(bits.values())) > 1 and report(out)["auto_scheme"]["average_bits"] <= 4


def test_rules_and_kept_layers_are_left_out(folder, tmp_path):
    changes = {"layer_config": {"layers.0.self_attn": "W8A16G64"}, "ignore_layers": ["down_proj"]}
    run = make(folder, 5.0, options="W4A16G32,BF16", quant_lm_head=True, **changes)
    run.quantize_and_save(tmp_path, format="auto_round")
    layers = run.plan.layers
    assert {layers[n].scheme.bits for n in layers if "layers.0.self_attn" in n} == {8}
    assert not any(layers[name].is_quantized for name in layers if "down_proj" in name)
    assert "lm_head" in run.choice.recipe and not any("down_proj" in name for name in run.choice.recipe)
    assert layers["lm_head"].reason in ("AutoScheme: W4A16G32", "AutoScheme: BF16")


@pytest.mark.parametrize("format", ["auto_round", "llm_compressor"])
def test_bytes_of_the_weights_are_a_budget_too(folder, tmp_path, format):
    sizes = {}
    for target in ("215kB", 260_000):
        run = make(folder, scheme=AutoScheme(target_size=target, options="W2A16G32,W4A16G32,W8A16G32"))
        _, out = run.quantize_and_save(tmp_path / str(target), format=format)
        sizes[target] = report(out)["sizes"]["output_bytes"]
    headers = 12_000
    assert 205_000 < sizes["215kB"] < 215_000 + headers and 250_000 < sizes[260_000] < 260_000 + headers
    with pytest.raises(PlanError, match="cannot be reached: the smallest options take"):
        make(folder, scheme=AutoScheme(target_size="50kB", options=OPTIONS)).quantize_and_save(tmp_path)


def test_llama_cpps_types_can_be_options(folder, tmp_path):
    model = save_tiny(tiny_llama(hidden_size=256, intermediate_size=256), tmp_path / "wide")
    run = make(model, 4.0, options="GGUF:Q2_K_S,GGUF:Q4_K_M,GGUF:Q6_K", format="gguf:q4_k_m")
    run.quantize_and_save(tmp_path / "out")
    assert len({layer.scheme for layer in run.plan.quantized().values()}) > 1


def test_a_restart_measures_nothing_again(folder, tmp_path, monkeypatch):
    counted = []

    def counting(*args, **kwargs):
        counted.append(1)
        return sensitivity.measure(*args, **kwargs)

    monkeypatch.setattr(choose, "measure", counting)
    first = make(folder, iters=2, max_memory="8GiB")
    _, out = first.quantize_and_save(tmp_path)
    again = make(folder, iters=2, max_memory="8GiB")
    again.quantize_and_save(tmp_path)
    assert len(counted) == 1 and again.choice.recipe == first.choice.recipe
    assert all(block["resumed"] for block in again.block_log) and not any(b["resumed"] for b in first.block_log)
    make(folder, iters=2, seed=1).quantize_and_save(tmp_path)
    assert len(counted) == 2  # other labels are drawn
    (file, _) = sorted(Path(f"{out}.work").glob("sensitivity-*.json"), key=lambda file: file.stat().st_mtime)
    file.write_text('{"losses": {"a": [1]}, "tokens": 1}')
    make(folder, iters=2).quantize_and_save(tmp_path)
    assert len(counted) == 3


def test_other_ranks_are_told(folder, monkeypatch):
    main_rank = make(folder)
    main_rank.choose_schemes()
    message = []
    monkeypatch.setattr(type(main_rank.ranks), "everyone", lambda self, said: message.append(said) or [message[0]])
    first, other = make(folder), make(folder)
    first.choose_schemes()
    object.__setattr__(other.ranks, "rank", 1)
    monkeypatch.setattr(choose, "measure", None)
    other.choose_schemes()
    assert message[1] == b"" and other.choice.recipe == first.choice.recipe == main_rank.choice.recipe


# ---- what is asked for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"schemes": OPTIONS}, SettingsError, "needs a budget: avg_bits"),
        ({"schemes": OPTIONS, "bits": 3.0, "target_size": "1GB"}, SettingsError, "not both"),
        ({"schemes": "W4A16", "bits": 4.0}, SettingsError, "two options or more"),
        ({"schemes": "W4A16,w4a16", "bits": 4.0}, SettingsError, "two options or more"),
        ({"schemes": "W4A16,W9A16", "bits": 4.0}, SchemeError, "unknown scheme 'W9A16'"),
        ({"schemes": "W4A16,Q4_K_MIXED", "bits": 4.0}, SchemeError, "is a mixture itself"),
        ({"schemes": OPTIONS, "bits": 3, "scheme": "W8A16"}, SettingsError, "contradict each other"),
        ({"target_size": "1GB"}, SettingsError, "target_size goes with schemes to choose from"),
        ({"schemes": OPTIONS, "target_size": "huge"}, SettingsError, "not a number of bytes or a size"),
        ({"schemes": OPTIONS, "avg_bits": -1}, SettingsError, "number of bits per weight"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(arguments, kind, words):
    with pytest.raises(kind, match=words):
        AutoRound("no/such/model", **arguments)


@pytest.mark.parametrize("bits", [2.5, 8.8])
def test_a_budget_out_of_reach_names_what_options_give(folder, bits, monkeypatch):
    monkeypatch.setattr(choose, "measure", None)  # nothing is measured for it
    with pytest.raises(ValueError, match=r"2.56 to 8.75 bits: W2A16G32 2.56, W4A16G32 4.62, W8A16G32 8.75"):
        make(folder, bits).quantize()


def test_a_model_without_gradients_is_named(folder, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no backward for this kernel")

    monkeypatch.setattr(torch.autograd, "backward", fails)
    with pytest.raises(PlanError, match=r"needs gradients.*no backward for this kernel.*layer_config"):
        make(folder).choose_schemes()


def test_arguments_say_the_same_as_an_object(folder):
    run = AutoRound(folder, schemes=["W2A16", "W4A16"], bits=3.0, group_size=32, device_map="cpu", show_progress=False)
    assert list(run.auto.schemes.values()) == [parse_scheme("W2A16G32"), parse_scheme("W4A16G32")]
    assert run.auto.avg_bits == 3.0
    older = AutoRound(folder, options="W2A16G32,W4A16G32", avg_bits=3.0, device_map="cpu", show_progress=False)
    assert older.auto.schemes == AutoScheme(3.0, "w2a16g32, W4A16G32").schemes


def options(*words: str) -> dict:
    return settings_for(make_parser().parse([*words]))


def test_options_of_the_command():
    told = options("MODEL", "--schemes", "W2A16,W4A16", "W8A16", "--bits", "3.5", "--shared-layers", "a,b", "c", "d")
    assert told["schemes"] == "W2A16,W4A16,W8A16" and told["bits"] == 3.5
    assert told["shared_layers"] == [["a", "b"], ["c", "d"]]
    assert options("M", "--options", "W2A16,W4A16", "--target_bits", "3")["bits"] == 3
    assert options("M", "--schemes", "A,B", "--target-size", "20GB")["target_size"] == "20GB"


def test_the_command_and_the_line_that_repeats_it(folder, tmp_path, capsys):
    common = ["--iters", "0", "--nsamples", "8", "--seqlen", "32", "--device_map", "cpu"]
    chosen = ["--schemes", OPTIONS, "--bits", "4.5", "--shared_layers", "o_proj,down_proj", "--ignore_scale_zp_bits"]
    assert main([str(folder), *common, *chosen, "--output_dir", str(tmp_path)]) == 0
    assert "bits on average, asked for: 4.5 bits of W2A16G32, W4A16G32, W8A16G32" in capsys.readouterr().out
    told = report(tmp_path / "tiny-auto-4.5bits")
    bits = {layer["name"]: layer["bits"] for layer in told["layers"]}
    assert bits["model.layers.1.self_attn.o_proj"] == bits["model.layers.1.mlp.down_proj"]
    for word in (f"--schemes={OPTIONS}", "--bits=4.5", "--shared_layers=o_proj,down_proj", "--ignore_scale_zp_bits"):
        assert word in told["command"]
    assert main(["plan", str(folder), *common, *chosen, "--output_dir", str(tmp_path), "--json"]) == 0
    assert any("is chosen when the run starts" in said for said in json.loads(capsys.readouterr().out)["warnings"])
    run = AutoRound(
        folder, scheme=AutoScheme(3.0, OPTIONS), dataset=None, device_map="cpu", iters=0, nsamples=8, seqlen=32
    )
    run.quantize_and_save(tmp_path / "object")
    assert f"--schemes={OPTIONS} --bits=3.0" in run.report["command"].replace("'", "")
