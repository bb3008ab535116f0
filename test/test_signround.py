"""Tuning: it helps, it is reproducible, and it never ends worse than where it started."""

import json
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_llama, token_ids

from auto_round import AutoRound
from auto_round.calibration.block_io import Activations
from auto_round.settings import SettingsError


def compressor(folder, **changes):
    arguments = {
        "scheme": "W2A16G32",
        "dataset": token_ids(16),
        "nsamples": 16,
        "seqlen": 32,
        "batch_size": 4,
        "iters": 20,
        "device_map": "cpu",
        "show_progress": False,
    }
    return AutoRound(str(folder), **{**arguments, **changes})


def test_tuning_lowers_the_loss_of_every_block(tiny_dir, tmp_path):
    run = compressor(tiny_dir, iters=60)
    run.quantize_and_save(tmp_path / "out")
    for block in run.block_log:
        assert block["final_loss"] < block["start_loss"]
        assert block["losses"][0] == (0, block["start_loss"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sym": False},
        {"group_size": -1},
        {"group_size": 0},
        {"bits": 3, "enable_minmax_tuning": False},
        {"enable_quanted_input": False},
        {"momentum": 0.0},
        {"gradient_accumulate_steps": 2, "batch_size": 2},
        {"bits": 8, "sym": False},
        {"bits": 5},
        {"dynamic_max_gap": 1},
        {"not_use_best_mse": True},
        {"algorithm": "adamround"},
        {"enable_adam": True, "sym": False, "lr": 0.01},
    ],
)
def test_settings_work_and_repeat(tiny_dir, changes):
    states = [compressor(tiny_dir, iters=3, **changes).quantize()[0].state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_gradient_accumulation_is_a_bigger_batch(tiny_dir):
    one = compressor(tiny_dir, iters=4, batch_size=4).quantize()[0].state_dict()
    two = compressor(tiny_dir, iters=4, batch_size=2, gradient_accumulate_steps=2).quantize()[0].state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("algorithm", ["signround", "adamround"])
def test_an_absurd_rate_falls_back_and_says_so(tiny_dir, algorithm):
    run = compressor(tiny_dir, iters=3, lr=9.0, minmax_lr=9.0, algorithm=algorithm)
    run.quantize()
    rounded = compressor(tiny_dir, iters=0)
    rounded.quantize()
    first = run.block_log[0]
    assert "is kept" in first["note"] and first["final_loss"] == first["start_loss"]
    names = list(run.plan.quantized(first["name"]))
    state, want = run.model.state_dict(), rounded.model.state_dict()
    assert all(torch.equal(state[f"{name}.weight"], want[f"{name}.weight"]) for name in names)


def test_adam_and_another_algorithm_contradict(tiny_dir):
    with pytest.raises(SettingsError, match="contradict"):
        compressor(tiny_dir, enable_adam=True, algorithm="signround")


def test_the_rate_of_tuning_is_told(tiny_dir, tmp_path):
    run = compressor(tiny_dir, iters=4)
    _, folder = run.quantize_and_save(tmp_path / "out")
    work = run.block_log[0]["work"]
    weights = sum(plan.info.numel for plan in run.plan.quantized(run.block_log[0]["name"]).values())
    tokens = 2 * 32  # half a batch of 4
    assert work["steps"] == 4 and work["flops"] >= 2 * 3 * weights * tokens * 0.9
    assert 0 < json.loads((Path(folder) / "report.json").read_text())["tuning_rate"]["fraction"] < 1


def test_activations_that_overflow_name_the_block(tiny_dir):
    run = compressor(tiny_dir, iters=2)
    run.calib()
    block = run.plan.block_names[0]
    put = Activations.put

    def poisoned(self, index, tensor):
        put(self, index, tensor * float("inf"))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=f"{block}.*not finite"):
        patch.setattr(Activations, "put", poisoned)
        run._quantize_blocks()


def test_no_improvement_keeps_the_start(tiny_dir):
    """A learning rate of zero tunes nothing: the result is optimized round-to-nearest, and is said to be."""
    run = compressor(tiny_dir, iters=2, lr=0.0, minmax_lr=0.0)
    run.quantize()
    assert all("kept" in block["note"] for block in run.block_log)


def test_samples_of_different_lengths(tmp_path):
    folder = save_tiny(tiny_llama(), tmp_path / "tiny")
    ids = token_ids(4, 32) + token_ids(4, 20)
    run = compressor(folder, dataset=ids, nsamples=8, iters=3)
    run.quantize()
    assert len(run.block_log) == 2


def test_a_model_object(tmp_path):
    from tiny import tiny_tokenizer

    model = tiny_llama()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = {"dataset": token_ids(8), "nsamples": 8, "seqlen": 32, "iters": 3, "show_progress": False}
    run = AutoRound(model, tiny_tokenizer(), scheme="W4A16G32", **arguments)
    quantized, layers = run.quantize()
    assert quantized is model
    assert len([name for name in layers if layers[name]["bits"] == 4]) == 14
    changed = {name for name in original if not torch.equal(original[name], model.state_dict()[name])}
    assert changed == {f"{name}.weight" for name, layer in layers.items() if layer["bits"] == 4}
    assert model.model.layers[0].mlp.down_proj.scale.shape == (64, 4)
    run.save_quantized(tmp_path / "saved")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    batch = token_ids(1)[0]
    with torch.no_grad():
        assert torch.allclose(loaded(batch).logits, model(batch).logits, atol=1e-4)
