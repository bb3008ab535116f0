"""Several processes that quantize one model: they find what one finds, and a run whose rank dies goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny, tiny_llama, token_ids

from auto_round import AutoRound
from auto_round.compressors.together import all_notes
from auto_round.progress import RunProgress
from auto_round.ranks import Ranks, RanksError
from auto_round.settings import SettingsError
from auto_round.store import Store
from auto_round.utils.device import device_of_rank
from auto_round.verify.values import file_hashes

SEQLEN = 256  # a micro-batch has 4 of them, which is what a rank has of a step: so sums are made of the same parts
OPTIONS = {"seqlen": SEQLEN, "nsamples": 16, "batch_size": 16, "group_size": 32}
RUNS = {
    "w4": {"scheme": "W4A16", "iters": 6},
    "w2": {"scheme": "W2A16", "iters": 6},
    "scales": {"scheme": "W2A16", "iters": 2, "scale_iters": 3},
    "kv": {"scheme": "W4A16", "iters": 0, "static_kv_dtype": "fp8"},
    "static": {"scheme": "FP8_STATIC", "iters": 0, "group_size": -1},
    "rtn": {"scheme": "W4A16", "iters": 0, "disable_opt_rtn": True, "quant_lm_head": True},
}
PRELOAD = ["auto_round.autoround", *(f"transformers.models.{n}.modeling_{n}" for n in ("auto", "llama", "qwen3_moe"))]
"""What every process would take seconds to import, imported once: they are forked from one that has it."""


def quantize(model: Path, out: Path, **options: Any) -> Any:
    options = {**OPTIONS, "dataset": token_ids(16, SEQLEN), "device_map": "cpu", "show_progress": False, **options}
    run = AutoRound(str(model), **options)
    run.quantize_and_save(out)
    return run


def several(models: dict[str, Path], out: Path) -> dict[str, Any]:
    """All of RUNS and a mixture of experts; what each run says of its blocks."""
    said = {}
    for name, options in RUNS.items():
        said[name] = quantize(models["llama"], out / name, **options).block_log
    moe = {"scheme": "W4A16", "iters": 2, "nsamples": 8, "dataset": token_ids(8, SEQLEN), "batch_size": 8}
    said["experts"] = quantize(models["moe"], out / "experts", **moe).block_log
    return said


def count_saved(models: dict[str, Path], out: Path) -> Any:
    """Like `several`, with the blocks that this rank has written."""
    save, saved = Store.save, []

    def counting(self, block, result):
        saved.append(block)
        save(self, block, result)

    Store.save = counting
    return several(models, out), saved


def disturbed(model: Path, out: Path, number: int) -> Any:
    """Rank 1 is killed while block `number` is tuned."""
    step = RunProgress.step

    def deadly(self, block, name, iteration, loss):
        if block == number and iteration == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, block, name, iteration, loss)

    RunProgress.step = deadly
    return quantize(model, out, **RUNS["w2"]).block_log


def differing(model: Path, out: Path) -> Any:
    return quantize(model, out, **RUNS["rtn"], seed=int(os.environ["RANK"])).block_log


def few_samples(model: Path, out: Path) -> Any:
    return quantize(model, out, iters=1, nsamples=1, dataset=token_ids(1, SEQLEN)).block_log


def _child(rank: int, world: int, port: int, report: Path, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        result = function(*arguments)
    except (RanksError, ValueError) as error:
        report.write_text(json.dumps(str(error)))
        raise SystemExit(1) from None
    report.write_text(json.dumps(result))


def ranked(folder: Path, function: Callable, *arguments: Any, world: int = 2) -> list[tuple[int, Any]]:
    """(exit code, result or message) of each of so many ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    reports = [folder / f"rank{rank}.json" for rank in range(world)]
    made = [(rank, world, port, report, function, arguments) for rank, report in enumerate(reports)]
    processes = [context.Process(target=_child, args=args) for args in made]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "a rank hangs"
    results = [json.loads(report.read_text()) if report.exists() else None for report in reports]
    return [(process.exitcode, result) for process, result in zip(processes, results, strict=True)]


def weights(folder: Path) -> dict[str, str]:
    (config,) = folder.glob("*/config.json")
    return {n: h for n, h in file_hashes(config.parent).items() if n.endswith((".safetensors", "config.json"))}


def codes(folder: Path) -> dict[str, torch.Tensor]:
    """Every code of a work folder, by layer."""
    from safetensors.torch import load_file

    from auto_round.formats.packing import unpack_bits

    (settings,) = folder.glob("*.work/*/run.json")
    layers = json.loads(settings.read_text())["layers"]
    found = {}
    for file in settings.parent.glob("*.safetensors"):
        tensors = load_file(file)
        for name in layers:
            if f"{name}.codes" in tensors:
                found[name] = unpack_bits(tensors[f"{name}.codes"], layers[name]["bits"], dim=1)
    assert found.keys() == layers.keys()
    return found


def learned_scales(folder: Path) -> torch.Tensor:
    """Scales that were trained end to end, all in one row."""
    from safetensors.torch import load_file

    (file,) = folder.glob("*.work/*/scales.safetensors")
    return torch.cat([scale.flatten().float() for _, scale in sorted(load_file(file).items())])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    moe = tiny("qwen3_moe", num_hidden_layers=2, num_experts=8, num_experts_per_tok=2)
    llama = tiny_llama(num_hidden_layers=3, max_position_embeddings=512)
    return {"llama": save_tiny(llama, folder / "llama"), "moe": save_tiny(moe, folder / "moe")}


def test_two_ranks_find_what_one_finds(models, tmp_path):
    one = several(models, tmp_path / "one")
    (_, (main, saved)), (_, (other, others)) = ranked(tmp_path, count_saved, models, tmp_path / "two")
    for name in one:
        expected, found = codes(tmp_path / "one" / name), codes(tmp_path / "two" / name)
        same = sum((found[layer] == codes).sum().item() for layer, codes in expected.items())
        assert same >= 0.999 * sum(codes.numel() for codes in expected.values()), name
        assert [block["experts"] for block in main[name]] == [block["experts"] for block in one[name]], name
        assert [block["final_loss"] for block in main[name]] == [block["final_loss"] for block in other[name]]
        loss = [block["final_loss"] or 0 for block in one[name]]
        assert [block["final_loss"] or 0 for block in main[name]] == pytest.approx(loss, rel=1e-3)
    assert any(block["experts"] for block in one["experts"])
    learned = [learned_scales(tmp_path / ranks / "scales") for ranks in ("one", "two")]
    near = torch.isclose(*learned, rtol=2e-3)  # Adam divides by spreads, so that rounding shows where they are tiny
    assert near.float().mean() > 0.99 and not torch.equal(learned[0], torch.ones_like(learned[0]))
    for name in ("kv", "static", "rtn"):  # with the scales of caches and inputs
        assert weights(tmp_path / "one" / name) == weights(tmp_path / "two" / name)
    assert others == ["model.layers.1"]  # rounding without data is spread by block, everything else written by one
    assert len(saved) == 3 * len(RUNS) - 1 + 1 + 2


def test_a_rank_that_is_killed_ends_the_run_and_it_goes_on(models, tmp_path):
    model = models["llama"]
    assert [code for code, _ in ranked(tmp_path, disturbed, model, tmp_path / "whole", 9)] == [0, 0]
    (code, message), (killed, _) = ranked(tmp_path / "1", disturbed, model, tmp_path / "parts", 1)
    assert killed == -signal.SIGKILL and code == 1
    assert "another rank has ended" in message and "same command goes on" in message
    assert not list((tmp_path / "parts").glob("*/config.json"))
    (_, log), (_, other) = ranked(tmp_path / "2", disturbed, model, tmp_path / "parts", 9)
    assert [block["resumed"] for block in log] == [block["resumed"] for block in other] == [True, False, False]
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_what_ranks_cannot_do_together_is_said(models, tmp_path):
    for code, message in ranked(tmp_path, differing, models["llama"], tmp_path / "out"):
        assert code == 1 and "rank 1 has other settings" in message
    for code, message in ranked(tmp_path, few_samples, models["llama"], tmp_path / "out"):
        assert code == 1 and "1 samples cannot be shared by 2 ranks" in message


def test_several_devices_on_the_command_line(models, tmp_path):
    command = [sys.executable, "-m", "auto_round", str(models["llama"]), "--device_map", "cpu,cpu"]
    options = {"iters": 2, "nsamples": 4, "seqlen": 64, "group_size": 32}
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "two")], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("Quantized 21/21 layers") == 1 and done.stderr.count("INFO saved") == 1
    (file,) = (tmp_path / "two").glob("*/report.json")
    report = json.loads(file.read_text())
    assert report["data"]["samples"] == 4 and all(check["passed"] for check in report["checks"])


def test_several_devices_need_several_processes():
    with pytest.raises(SettingsError, match=r"torchrun --nproc-per-node 2"):
        AutoRound("nowhere", device_map="cpu,cpu")


def test_the_device_of_a_rank():
    assert device_of_rank("cpu,cpu", Ranks(1, 2, 1, 2)) == torch.device("cpu")
    assert device_of_rank("auto", Ranks()).type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="2 devices for 3 ranks"):
        device_of_rank("cpu,cpu", Ranks(0, 3, 0, 3))


@pytest.mark.parametrize("count", [7, 8, 13])
def test_steps_are_made_of_the_same_samples(count):
    size = Ranks(0, 4).step_size(4, count)
    assert size == 4
    alone = Ranks().share(count, size)
    assert alone == list(range(count))
    for world in (2, 4):
        shares = [Ranks(rank, world).share(count, size) for rank in range(world)]
        assert sorted(sample for share in shares for sample in share) == alone
        own = size // world
        for step in range(count // size):
            taken = [sample for share in shares for sample in share[step * own : (step + 1) * own]]
            assert taken == alone[step * size : (step + 1) * size]


def test_step_sizes():
    assert Ranks(0, 3).step_size(4, 100) == 6 and Ranks(0, 3).step_size(4, 5) == 3 and Ranks().step_size(4, 3) == 3
    with pytest.raises(RanksError, match="fewer ranks"):
        Ranks(0, 3).step_size(4, 2)


def test_warnings_of_other_ranks_reach_the_report():
    class Two(Ranks):
        def everyone(self, message):
            return [message, json.dumps([[{"name": "a"}], ["same", "other"]]).encode()]

    blocks, warnings = all_notes([{"name": "b"}], ["same"], ["a", "b"], Two(0, 2))
    assert [block["name"] for block in blocks] == ["a", "b"]
    assert warnings == ["same", "rank 1: other"]


def test_work_is_divided_by_its_cost():
    costs = {"a": 1.0, "b": 5.0, "c": 3.0, "d": 1.0}
    assert [Ranks(rank, 2).mine(costs) for rank in range(2)] == [["b"], ["a", "c", "d"]]
    assert Ranks().mine(costs) == list(costs)
