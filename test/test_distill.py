"""Training scales end to end: the slopes are the whole model's own, it helps, and nothing that stops it is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file
from tiny import save_tiny, tiny, tiny_llama, token_ids
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from auto_round import AutoRound
from auto_round.compressors.distill import Distillation
from auto_round.settings import SettingsError
from auto_round.store import Store, StoreError
from auto_round.verify.values import file_hashes


def make(model, **changes):
    usual = {"scheme": "W2A16G32", "iters": 0, "dataset": token_ids(8), "nsamples": 8, "seqlen": 32, "batch_size": 8}
    return AutoRound(
        model if isinstance(model, torch.nn.Module) else str(model),
        **{"device_map": "cpu", "show_progress": False, "scale_iters": 12, **usual, **changes},
    )


def weights(folder):
    return {n: h for n, h in file_hashes(Path(folder)).items() if n.endswith((".safetensors", ".json"))}


@pytest.mark.parametrize("build", [lambda: tiny_llama(), lambda: tiny("qwen3_moe"), lambda: tiny("gemma3_text")])
def test_slopes_are_those_of_the_whole_model(build, tmp_path, monkeypatch):
    """The first step's gradients equal autograd's through the whole model and its divergence from the original."""
    folder = save_tiny(build(), tmp_path / "tiny")
    found, whole = {}, Distillation._step

    def step(self, learning, samples):
        loss = whole(self, learning, samples)
        found.setdefault("step", (loss, dict(self._gradients), samples, self))
        return loss

    monkeypatch.setattr(Distillation, "_step", step)
    run = make(folder, scale_iters=1, amp=False, batch_size=8, scheme="W4A16G32")
    run.quantize()
    loss, gradients, samples, training = found["step"]
    tensors = {n: t for block in run.plan.block_names for n, t in training._tensors(block).items()}
    assert gradients.keys() == tensors.keys()
    expected_loss, expected = _by_autograd(run, folder, tensors, samples)
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-2, atol=1e-3 * expected[name].abs().max().item()), name


def _by_autograd(run, folder, tensors, samples):
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    factors = {name: torch.ones_like(t.scale, dtype=torch.float32).requires_grad_() for name, t in tensors.items()}
    for part in run.plan.block_names:
        run.streamed.load(part)
    replaced = {
        f"{name}.weight": (t.dequantize().view(*t.scale.shape, -1) * factors[name].unsqueeze(-1)).view(t.codes.shape)
        for name, t in tensors.items()
    }
    total, tokens = 0.0, 0
    for sample in samples:
        with torch.no_grad():
            want = original(**sample).logits.float().log_softmax(-1)
        got = functional_call(run.model, replaced, (), {**sample, "use_cache": False}).logits.float().log_softmax(-1)
        divergence = (want.exp() * (want - got)).sum()
        divergence.backward(retain_graph=True)
        total, tokens = total + divergence.item(), tokens + want.shape[1]
    zero = torch.zeros(())
    return total / tokens, {n: zero.expand_as(f) if f.grad is None else f.grad for n, f in factors.items()}


@pytest.mark.parametrize("sym", [True, False])
def test_the_divergence_falls_and_the_artifact_has_it(sym, tmp_path):
    folder = save_tiny(tiny_llama(), tmp_path / "tiny")
    _, plain = make(folder, scale_iters=0, sym=sym).quantize_and_save(tmp_path / "plain")
    run = make(folder, sym=sym, scale_lr=0.02, scale_iters=30)
    _, trained = run.quantize_and_save(tmp_path / "trained")
    losses = [loss for _, loss in run.scale_log]
    assert len(losses) == 30 and sum(losses[-3:]) < 0.95 * sum(losses[:3])
    assert run.report["kl"] > 0 and run.report["scales"]["losses"] == run.scale_log
    assert weights(plain) != weights(trained)


def test_a_stopped_training_goes_on(tmp_path, monkeypatch):
    folder = save_tiny(tiny_llama(num_hidden_layers=3), tmp_path / "tiny")
    _, whole = make(folder, iters=2).quantize_and_save(tmp_path / "whole")
    step, done = Distillation._step, []

    def failing(self, learning, samples):
        if learning.step == 11:
            raise KeyboardInterrupt
        done.append(learning.step)
        return step(self, learning, samples)

    monkeypatch.setattr(Distillation, "_step", failing)
    with pytest.raises(KeyboardInterrupt):
        make(folder, iters=2).quantize_and_save(tmp_path / "parts")
    monkeypatch.setattr(Distillation, "_step", lambda *args: done.append(args[1].step) or step(*args))
    again = make(folder, iters=2)
    _, parts = again.quantize_and_save(tmp_path / "parts")
    assert done == [*range(11), 10, 11]
    assert len(again.scale_log) == 12
    assert weights(whole) == weights(parts)


def test_a_finished_training_is_not_repeated_unless_a_block_was(tmp_path, monkeypatch):
    folder = save_tiny(tiny_llama(num_hidden_layers=3), tmp_path / "tiny")
    first = make(folder, iters=2)
    first.run(tmp_path / "work")
    learned = (first.store.folder / "scales.safetensors").read_bytes()
    first.store.close()
    steps, step = [], Distillation._step
    monkeypatch.setattr(Distillation, "_step", lambda *args: steps.append(1) or step(*args))
    second = make(folder, iters=2)
    second.run(tmp_path / "work")
    assert not steps and second.scale_log == [tuple(entry) for entry in first.scale_log]
    second.store.path(second.plan.block_names[1]).unlink()
    second.store.close()
    third = make(folder, iters=2)
    third.run(tmp_path / "work")
    assert not steps, "the block came out the same, so what was learned still holds"
    assert (third.store.folder / "scales.safetensors").read_bytes() == learned
    third.store.close()


def test_damaged_scales_are_learned_again_and_never_read(tmp_path):
    folder = save_tiny(tiny_llama(), tmp_path / "tiny")
    run = make(folder, iters=0, scale_iters=2)
    run.run(tmp_path / "work")
    file, block = run.store.folder / "scales.safetensors", run.plan.block_names[0]
    learned = file.read_bytes()
    run.store.close()
    file.write_bytes(learned[:-1] + bytes([learned[-1] ^ 1]))
    again = make(folder, iters=0, scale_iters=2)
    store = Store(tmp_path / "work", again.facts() | {"data": run.store.facts["data"]})
    with pytest.raises(StoreError, match=r"scales.safetensors is damaged"):
        store.load(block, run.plan.quantized(block))
    store.close()
    again.run(tmp_path / "work")
    found = load_file(file)
    assert all(torch.equal(found[name], scale) for name, scale in load(learned).items())
    again.store.close()


def test_what_cannot_be_trained_is_said(tmp_path):
    model = tiny_llama()
    folder = save_tiny(model, tmp_path / "tiny")
    loaded = make(model, tokenizer=None)
    loaded.quantize()
    assert any("give the model's folder" in note for note in loaded.warnings)
    floats = make(folder, scheme="MXFP4")
    floats.quantize()
    assert any("no layer is of a number format" in note for note in floats.warnings)
    with pytest.raises(SettingsError, match="scale_iters"):
        make(folder, scale_iters=-1)
