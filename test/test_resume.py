"""A run that is killed goes on from its last complete block and ends with the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_llama, token_ids

from auto_round import AutoRound
from auto_round.store import Store, StoreError
from auto_round.verify.values import file_hashes

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {test!r})
from tiny import token_ids
from auto_round import AutoRound
AutoRound({model!r}, scheme="W2A16G32", dataset=token_ids(8), nsamples=8, seqlen=32, batch_size=4, iters=8,
          device_map="cpu", show_progress=False).quantize_and_save({out!r})
"""


def run(model, out, **changes):
    arguments = {"dataset": token_ids(8), "nsamples": 8, "seqlen": 32, "batch_size": 4, "iters": 8}
    made = AutoRound(str(model), scheme="W2A16G32", device_map="cpu", show_progress=False, **{**arguments, **changes})
    return made, made.quantize_and_save(out)[1]


def weights(folder):
    return {n: h for n, h in file_hashes(Path(folder)).items() if n.endswith((".safetensors", ".json"))}


@pytest.fixture
def model(tmp_path):
    return save_tiny(tiny_llama(num_hidden_layers=4), tmp_path / "tiny")


def test_interrupted_between_blocks(model, tmp_path, monkeypatch):
    _, whole = run(model, tmp_path / "whole")
    save, saved = Store.save, []

    def failing(self, block, result):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(block)
        save(self, block, result)

    monkeypatch.setattr(Store, "save", failing)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "parts")
    assert not any((tmp_path / "parts").glob("tiny-w2g32"))
    monkeypatch.setattr(Store, "save", save)
    again, parts = run(model, tmp_path / "parts")
    assert [block["resumed"] for block in again.block_log] == [True, True, False, False]
    assert weights(whole) == weights(parts)


def test_killed_at_any_moment(model, tmp_path):
    _, whole = run(model, tmp_path / "whole")
    script = SCRIPT.format(test=os.path.dirname(__file__), model=str(model), out=str(tmp_path / "killed"))
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}
    for want in (1, 3):
        process = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL)
        _wait_for_blocks(process, tmp_path / "killed", want)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(list((tmp_path / "killed").glob("*.work/*/*.safetensors"))) >= want
    _, killed = run(model, tmp_path / "killed")
    assert weights(whole) == weights(killed)


def _wait_for_blocks(process, folder, count):
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if len(list(folder.glob("*.work/*/*.safetensors"))) >= count:
            return
        time.sleep(0.02)


def test_a_damaged_block_is_done_again(model, tmp_path):
    _, whole = run(model, tmp_path / "out")
    before = weights(whole)
    block = sorted((tmp_path / "out").glob("*.work/*/*.safetensors"))[0]
    data = bytearray(block.read_bytes())
    data[-3] ^= 0xFF
    block.write_bytes(bytes(data))
    again, folder = run(model, tmp_path / "out")
    assert sum(not entry["resumed"] for entry in again.block_log) == 1
    assert weights(folder) == before


def test_other_settings_use_another_work_folder(model, tmp_path):
    run(model, tmp_path / "out", iters=2)
    again, _ = run(model, tmp_path / "out", iters=3)
    assert not any(entry["resumed"] for entry in again.block_log)
    assert len(list((tmp_path / "out").glob("*.work/*"))) == 2


def test_two_runs_in_one_folder(tmp_path):
    first = Store(tmp_path, {"a": 1})
    with pytest.raises(StoreError, match="in use"):
        Store(tmp_path, {"a": 1})
    first.close()
    Store(tmp_path, {"a": 1}).close()


def test_runs_repeat_bit_for_bit(model, tmp_path):
    _, one = run(model, tmp_path / "one")
    torch.manual_seed(1234)
    _, two = run(model, tmp_path / "two")
    assert weights(one) == weights(two)
