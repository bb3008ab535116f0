"""Tables at the end of a command. Everything printed is text, never markup: names may hold brackets."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from auto_round.report import (
    expert_words,
    figure,
    group_layers,
    mib,
    rate_words,
    scheme_words,
    seconds,
    size,
    text_words,
    total_seconds,
)

PIPE_WIDTH = 120
SHOWN_NAMES = 6  # of the layers that share a reason


def console() -> Console:
    """Standard output; wide enough for paths where there is no terminal."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False, soft_wrap=False)


def print_table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]], right: Iterable[int] = ()) -> None:
    """A table with a heading; columns in `right` are set flush right."""
    table = Table(title=Text(title, style="bold"), title_justify="left")
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index in set(right) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def print_pairs(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Two columns without a heading: what, and how much."""
    table = Table(title=Text(title, style="bold"), title_justify="left", show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value, style="yellow" if name == "warning" else ""))
    console().print(table)


def print_report(report: Mapping[str, Any], wall: float | None = None) -> None:
    """The table of a finished run, and how to load what it wrote."""
    done, total = report["quantized_layers"]
    print_pairs(f"Quantized {done}/{total} layers of {report['model']}", list(report_rows(report, wall)))
    for line in how_to_load(report):
        console().print(Text(line), soft_wrap=True)


def how_to_load(report: Mapping[str, Any]) -> list[str]:
    """Lines that a person can copy to run what was written."""
    folder, name = report["folder"], report.get("format", "")
    if name.startswith("gguf:"):
        file = next((name for name in report.get("files", {}) if name.endswith(".gguf")), "FILE.gguf")
        return ["Run it with llama.cpp:", f"  llama-cli -m {folder}/{file}"]
    if name == "mlx":
        return ["Run it with mlx-lm:", f"  mlx_lm.generate --model {folder} --prompt 'Hello'"]
    loader, options = report.get("auto_class", "AutoModelForCausalLM"), ""
    lines = ["Load it with Transformers:", f"  from transformers import {loader}"]
    if name in ("auto_gptq", "auto_awq"):
        lines[1] += ", AutoRoundConfig"
        options = ", quantization_config=AutoRoundConfig()"
    return [*lines, f"  model = {loader}.from_pretrained({folder!r}{options})"]


def report_rows(report: Mapping[str, Any], wall: float | None = None) -> Iterable[tuple[str, str]]:
    """(what, how much) of a report."""
    yield from layer_rows(report.get("layers") or ())
    if report.get("data"):
        yield "calibration text", text_words(report["data"])
    if report.get("auto_scheme"):
        yield "schemes", choice_words(report["auto_scheme"])
    experts = expert_words(report.get("blocks") or ())
    if experts:
        yield "experts", experts
    for tensor in report.get("large_kept") or ():
        yield "large, kept", f"{tensor['name']} ({tensor['numel'] / 1e6:.1f} M): {tensor['reason']}"
    ledger = report.get("ledger") or {}
    yield "tensors", ", ".join(f"{count} {fate}" for fate, count in ledger.items() if count)
    if report.get("kl") is not None:
        yield "from the original", f"KL {figure(report['kl'])} nats per token, top-1 agreement {report['top1']:.1%}"
    sizes = report["sizes"]
    share = sizes["output_bytes"] / max(sizes["source_bytes"], 1)
    yield "size", f"{size(sizes['source_bytes'])} → {size(sizes['output_bytes'])} ({share:.0%})"
    yield "time", _times(report.get("times") or {}, wall)
    if report.get("minutes"):
        yield "picked", report["minutes"]["words"]
    if report.get("scales"):
        (_, first), *_, (_, last) = report["scales"]["losses"]
        yield "scales trained together", f"KL of the calibration text {first:.4g} -> {last:.4g}"
    if report.get("tuning_rate"):
        yield "tuning steps", f"{rate_words(report['tuning_rate'])} of the rate of a large matrix product"
    yield "peak memory", f"{mib(report.get('peak_memory_mb'))} ({mib(report.get('import_memory_mb'))} after importing)"
    if report.get("device_peak_mb"):
        yield "peak memory, GPU", mib(report["device_peak_mb"])
    checks = report.get("checks") or ()
    yield "checks", f"{len(checks)} passed: " + ", ".join(check["name"] for check in checks)
    for warning in report.get("warnings") or ():
        yield "warning", str(warning)
    yield "files", report["folder"]
    yield "report", f"{report['folder']}/report.html (and report.json)"


def choice_words(choice: Mapping[str, Any]) -> str:
    """What AutoScheme chose."""
    measured = f", measured {figure(choice['measured_kl'])}" if choice.get("measured_kl") is not None else ""
    return (
        f"{choice['average_bits']:.2f} bits on average, asked for: {choice['asked']}; KL expected of rounding to "
        f"nearest {figure(choice['predicted_kl'])}{measured}"
    )


def layer_rows(layers: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """(what, which) of layers as a report lists them: those that share scheme and reason together."""
    for names, layer in group_layers(one for one in layers if one["status"] == "quantized"):
        rule = "" if layer["reason"] == "default" else f" ({layer['reason']}): {_shown(names)}"
        yield "quantized", scheme_words(layer) + rule
    for names, layer in group_layers(one for one in layers if one["status"] != "quantized"):
        yield "kept", f"{layer['reason']}: {_shown(names)}"


def silence_loading() -> None:
    """Keep Transformers from drawing a progress bar for every model that is loaded to be checked or measured.

    Not called before the user's model is there: a download should show its progress.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()


def _shown(names: list[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more groups" if more > 0 else "")


def _times(times: Mapping[str, float], wall: float | None) -> str:
    stages = [name for name in ("load", "choose", "calibrate", "tune", "export", "verify") if name in times]
    parts = ", ".join(f"{name} {seconds(times[name])}" for name in stages)
    return f"{seconds(wall if wall is not None else total_seconds(times))} ({parts})"
