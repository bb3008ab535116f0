"""A budget of minutes: what is picked at a known speed, what is refused, and that a restart picks the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tiny import save_tiny, tiny_llama, token_ids

from auto_round import AutoRound
from auto_round.cli.main import main
from auto_round.cli.parser import UsageError
from auto_round.cli.quantize import make_parser, settings_for
from auto_round.compressors import afford
from auto_round.compressors.minutes import KEPT, LADDER, SHARE, settle
from auto_round.settings import SettingsError
from auto_round.speed import LayerSpeed, Speed

OPTIONS = {"nsamples": 8, "seqlen": 32, "group_size": 32, "show_progress": False, "device_map": "cpu"}


@pytest.fixture
def at_speed(monkeypatch):
    """Sets how many times as fast as usual the machine seems to be."""

    def become(factor: float) -> None:
        layer = LayerSpeed(*(value / factor for value in (1e-6, 2e-6, 1e-6, 1e-6, 1e-9, 1e-7, 1e-6)))

        def fake(shapes, glue, setting) -> Speed:
            return Speed(dict.fromkeys(shapes, layer), 1e-6 / factor, 2e-6 / factor, 1e-9)

        monkeypatch.setattr(afford, "measure", fake)

    become(1)
    return become


def seconds_of(model, point) -> float:
    """What an estimate of a run that asks for the point itself says."""
    run = AutoRound(str(model), **OPTIONS, **point.arguments())
    return afford.estimate_run(run, afford.work_of(run), {}).total_seconds


def picked(model, **options):
    run = AutoRound(model if not isinstance(model, Path) else str(model), **{**OPTIONS, **options})
    settle(run, {}, None)
    return run


def test_the_best_point_that_fits_is_picked(tiny_dir, at_speed):
    """For each point, a budget that it just fits, and not the better ones, gives it; then one that it just does not."""
    times = [seconds_of(tiny_dir, point) for point in LADDER]
    for number, (point, took) in enumerate(zip(LADDER, times, strict=True)):
        if took >= min(times[number + 1 :], default=1e9):
            continue  # a better one takes less: this one is never picked
        run = picked(tiny_dir, minutes=took / 60 / SHARE * 1.0001)
        assert run.pick.point == point and run.pick.seconds == pytest.approx(took)
        assert (run.tune.iters, run.tune.scale_iters, run.tune.search) == dataclasses.astuple(point)
        assert run.algorithm_name == ("signround" if point.iters else "rtn")
        assert run.needs_data == (point != LADDER[0])
        if number:
            assert picked(tiny_dir, minutes=took / 60 / SHARE * 0.9999).pick.point != point
    assert run.pick.point == LADDER[-1] and run.pick.beyond is None


def test_a_faster_machine_gets_more(tiny_dir, at_speed):
    minutes = seconds_of(tiny_dir, LADDER[4]) / 60 / SHARE * 1.01
    slow = picked(tiny_dir, minutes=minutes).pick
    at_speed(1000)
    assert LADDER.index(picked(tiny_dir, minutes=minutes).pick.point) > LADDER.index(slow.point)


def test_scales_are_left_out_where_they_cannot_be_trained(at_speed):
    pick = picked(tiny_llama(), tokenizer=None, dataset=token_ids(8), minutes=1e6).pick
    assert pick.point.scale_iters == 0 and pick.point == LADDER[6]


def test_adam_stays_where_there_are_steps(tiny_dir, at_speed):
    assert picked(tiny_dir, minutes=1e6, enable_adam=True).algorithm_name == "adamround"
    assert picked(tiny_dir, minutes=seconds_of(tiny_dir, LADDER[1]) / 54, enable_adam=True).algorithm_name == "rtn"


def test_earlier_errors_are_put_right(tiny_dir, tmp_path, at_speed):
    """Where runs took twice what was estimated, half as much is picked."""
    took = seconds_of(tiny_dir, LADDER[4])
    estimate = {"ram": {"total": 1}, "vram": None, "disk": {"output": {"a": 1}}, "total_seconds": 1.0}
    report = {"estimate": estimate, "peak_memory_mb": 1, "blocks": [], "times": {"tune": 2.0}}
    (tmp_path / "out" / "x").mkdir(parents=True)
    (tmp_path / "out" / "x" / "report.json").write_text(json.dumps(report))
    for folder, factor in ((None, 1), (tmp_path / "out", 2)):
        run = AutoRound(str(tiny_dir), **OPTIONS, minutes=factor * took / 54 * 1.0001)
        settle(run, {}, folder)
        assert run.pick.point == LADDER[4] and run.pick.seconds == pytest.approx(factor * took)


def test_points_without_memory_are_passed_over(tiny_dir, at_speed, monkeypatch):
    monkeypatch.setattr("auto_round.compressors.minutes.problems", lambda run, *rest: (["no"] * run.tune.iters, []))
    assert picked(tiny_dir, minutes=1e6).pick.point == LADDER[1]


def test_too_little_time_is_refused_before_work(tiny_dir, tmp_path, at_speed):
    at_speed(1e-3)
    needed = seconds_of(tiny_dir, LADDER[0])
    with pytest.raises(SettingsError, match=r"rounding to nearest .* takes about .* or more") as caught:
        AutoRound(str(tiny_dir), **OPTIONS, minutes=needed / 60 * 0.95).quantize_and_save(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    enough = float(str(caught.value).rpartition("minutes=")[2].split()[0])
    assert picked(tiny_dir, minutes=enough).pick is not None


def test_a_restart_keeps_what_was_picked(tiny_dir, tmp_path, at_speed):
    """Also on a machine that is faster now; the report and its command name it."""
    minutes = seconds_of(tiny_dir, LADDER[2]) / 60 / SHARE * 1.2

    def report_of(**changes) -> dict:
        run = AutoRound(str(tiny_dir), **{**OPTIONS, "minutes": minutes, **changes})
        return json.loads((Path(run.quantize_and_save(tmp_path / "out")[1]) / "report.json").read_text())

    first = report_of()
    assert first["minutes"]["picked"] == {"iters": 25} == {"iters": first["settings"]["iters"]}
    assert f"minutes={minutes:g}: iters=25" in first["minutes"]["words"]
    assert "--iters=25" in first["command"] and "--minutes" not in first["command"]
    at_speed(1e4)
    again = report_of()
    assert again["minutes"] == first["minutes"] and all(block["resumed"] for block in again["blocks"])
    assert picked(tiny_dir, minutes=minutes).pick.point.iters > 25  # where nothing is kept
    (file,) = (tmp_path / "out").glob(f"*/{KEPT}")
    file.write_text("{")
    run = AutoRound(str(tiny_dir), **OPTIONS, minutes=minutes)
    settle(run, {}, None, file.parent)  # a damaged file is no reason to stop
    assert run.pick.point.iters > 25


@pytest.mark.parametrize(("given", "words"), [
    ({"minutes": 5, "iters": 200}, "minutes=5 and iters=200 contradict"),
    ({"minutes": 5, "scale_iters": 0}, "scale_iters=0"),
    ({"minutes": 5, "disable_opt_rtn": False}, "disable_opt_rtn"),
    ({"minutes": 5, "algorithm": "RTN"}, "algorithm='RTN'"),
    ({"minutes": 0}, "positive number"),
    ({"minutes": -1.5}, "positive number"),
    ({"minutes": float("nan")}, "positive number"),
    ({"minutes": True}, "positive number"),
    ({"minutes": "5"}, "positive number"),
])  # fmt: skip
def test_what_contradicts_a_budget(given, words):
    with pytest.raises(SettingsError, match=words):
        AutoRound("nowhere", **given)


def test_the_option(tmp_path, capsys, at_speed):
    """Fractions are taken, recipes contradict, `plan` shows what the run then takes."""
    options = make_parser().parse(["m", "--minutes", "0.5"])
    assert settings_for(options) == {"minutes": 0.5}
    with pytest.raises(UsageError, match="--recipe best"):
        settings_for(make_parser("best").parse(["m", "--minutes", "0.5"]))
    model = save_tiny(tiny_llama(), tmp_path / "tiny")
    line = [str(model), "--nsamples", "8", "--seqlen", "32", "--group_size", "32", "--device", "cpu"]
    line += ["--minutes", "0.07", "--output_dir", str(tmp_path / "out")]
    assert main(["plan", *line, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["estimate"]["total_seconds"] == pytest.approx(plan["minutes"]["seconds"])
    assert main(["plan", *line]) == 0 and "minutes=0.07: iters=" in capsys.readouterr().out
    assert main(line) == 0 and "minutes=0.07: iters=" in capsys.readouterr().out
    (file,) = (tmp_path / "out").glob("*/report.json")
    assert json.loads(file.read_text())["minutes"]["picked"] == plan["minutes"]["picked"]
