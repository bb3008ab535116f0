"""`auto-round plan MODEL …`: what a run with these options will do, need and take, before anything is downloaded."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from auto_round.cli.quantize import check_output, make_parser, settings_for, the_model

if TYPE_CHECKING:
    from auto_round.compressors.base import Compressor
    from auto_round.modeling.headers import HeaderModel

ABOUT = """What a run will do, need and take: auto-round plan MODEL [the options of quantizing]

Reads config.json and the headers of the weight files alone; of a hub id only these are fetched. Shows scheme and reason
for every layer, sizes, memory, disk, time on this machine, and what to change where it does not fit.
Exits with 1 if it does not fit."""


def run(arguments: list[str], recipe: str = "default") -> int:
    parser = make_parser(recipe)
    parser.prog, parser.description = "auto-round plan", ABOUT
    parser.add_argument("--json", action="store_true", default=False, help="print everything as JSON")
    if not arguments:
        parser.print_help()
        return 0
    options = parser.parse(arguments)
    model, formats = the_model(options), check_output(options)

    from auto_round.autoround import known_dtype
    from auto_round.modeling.headers import open_headers
    from auto_round.utils.device import pick_device

    settings = {name: value for name, value in settings_for(options).items() if name != "json"}
    device = pick_device(settings.get("device_map", 0))
    trust, dtype = settings.get("trust_remote_code", False), known_dtype(settings.pop("model_dtype", None))
    began = time.monotonic()
    with _uncollected(), open_headers(model, trust, dtype, device) as streamed:
        found = make_plan(model, streamed, settings, formats, Path(options.output_dir))
        found["planning_seconds"] = round(time.monotonic() - began, 2)
        if options.json:
            print(json.dumps(found, indent=2, default=str))
        else:
            _print(found)
    return 1 if found["problems"] else 0


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Do not look for garbage: a model of experts is a million objects that all stay to the end of the command."""
    wanted = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if wanted:
            gc.enable()


def make_plan(
    model: str, streamed: HeaderModel, settings: Mapping[str, Any], formats: str | None, folder: Path
) -> dict[str, Any]:
    """Everything that is known before the start, as plain values."""
    from auto_round.autoround import AutoRound
    from auto_round.compressors import afford, minutes
    from auto_round.compressors.saving import layer_list
    from auto_round.earlier import earlier_runs
    from auto_round.estimate import needed_samples

    tokenizer = SimpleNamespace(model_max_length=_longest(streamed.checkpoint.directory))
    compressor = AutoRound(streamed, tokenizer, **settings)
    chosen = [compressor.bind(name) for name in (formats or compressor.default_format).split(",")]
    sizes, plan = afford.output_sizes(compressor, chosen), compressor.plan
    minutes.settle(compressor, sizes, folder)
    work = afford.work_of(compressor)
    estimate = afford.estimate_run(compressor, work, sizes)
    memory, disk = afford.problems(
        compressor, work, estimate, afford.allowed(compressor, afford.resources(folder, compressor.device))
    )
    done = plan.quantized()
    return {
        "model": model,
        "scheme": compressor.scheme.to_dict(),
        "device": str(compressor.device),
        "formats": list(sizes),
        "blocks": [list(stack) for stack in plan.blocks],
        "quantized_layers": [len(done), sum(1 for one in plan.layers.values() if one.info.block or one.is_quantized)],
        "layers": layer_list(plan),
        "large_kept": _large_kept(compressor),
        "source_bytes": streamed.checkpoint.nbytes,
        "output_bytes": afford.possible_sizes(compressor, chosen[0], sizes[chosen[0].name]) | sizes,
        "estimate": estimate.to_dict(),
        "working": {**dataclasses.asdict(compressor.working), "micro_tokens": work.micro},
        "minutes": compressor.pick.describe() if compressor.pick is not None else None,
        "earlier": earlier_runs(folder).words(),
        "samples_for_experts": max((needed_samples(one, work) or 0 for one in estimate.experts), default=0) or None,
        "problems": [*memory, *disk],
        "warnings": [*compressor.warnings, *_not_chosen(compressor)],
    }


def _not_chosen(compressor: Compressor) -> list[str]:
    """What a plan cannot know of a run that chooses schemes."""
    if compressor.auto is None:
        return []
    return [f"each layer's scheme is chosen when the run starts ({compressor.auto}); until then one stands for all"]


def _large_kept(compressor: Compressor) -> list[dict[str, Any]]:
    from auto_round.formats.export import large_kept, make_ledger

    return large_kept(make_ledger(compressor.streamed, compressor.plan), compressor.streamed)


def _longest(directory: Path) -> int | None:
    """The tokenizer's limit on the length of a text, read without building it."""
    from auto_round.modeling.reading import CheckpointError, read_json

    try:
        limit = read_json(directory / "tokenizer_config.json").get("model_max_length")
    except CheckpointError:
        return None
    return int(limit) if isinstance(limit, (int, float)) and 0 < limit < 1e12 else None


# ---- the printed plan --------------------------------------------------------------------------------------------


def _print(found: Mapping[str, Any]) -> None:
    from auto_round.cli.summary import print_pairs

    done, total = found["quantized_layers"]
    print_pairs(f"Plan for {found['model']}: {done}/{total} layers quantized", list(_what(found)))
    print_pairs("Size", list(_sizes(found)))
    print_pairs(f"Needs, on {found['device']}", list(_needs(found)))
    if found["problems"]:
        print_pairs("Does not fit", [("warning", problem) for problem in found["problems"]])


def _what(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from auto_round.cli.summary import layer_rows
    from auto_round.report import compress_names

    for stack in found["blocks"]:
        yield "blocks", f"{len(stack)}: {', '.join(compress_names(stack))}"
    yield from layer_rows(found["layers"])
    alike: dict[tuple[str, int], list[str]] = {}
    for tensor in found["large_kept"]:
        alike.setdefault((tensor["reason"], tensor["numel"]), []).append(tensor["name"])
    for (reason, numel), names in alike.items():
        yield "large, kept", f"{', '.join(compress_names(names))} ({numel / 1e6:.1f} M each): {reason}"
    for one in found["estimate"]["experts"]:
        yield "experts", _expert_words(one, found["samples_for_experts"])
    for warning in found["warnings"]:
        yield "warning", warning


def _expert_words(one: Mapping[str, Any], wanted: int | None) -> str:
    text = f"{one['chosen']} of {one['experts']} for each token, {one['tokens']:.0f} calibration tokens each on average"
    return f"{text} (tuned from {one['floor']}); --nsamples {wanted} would do for most" if wanted else text


def _sizes(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Formats of one size together, the chosen ones first."""
    from auto_round.report import size

    yield "now", size(found["source_bytes"])
    groups: dict[int, list[str]] = {}
    for name, nbytes in found["output_bytes"].items():
        groups.setdefault(nbytes, []).append(name)
    chosen = set(found["formats"])
    for nbytes, names in sorted(groups.items(), key=lambda item: not chosen & set(item[1])):
        share = nbytes / max(found["source_bytes"], 1)
        yield "then" if chosen & set(names) else "or", f"{size(nbytes)} ({share:.0%}) as {', '.join(names)}"


def _needs(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from auto_round.report import seconds, size

    estimate = found["estimate"]
    for key, name in (("ram", "RAM"), ("vram", "VRAM")):
        if estimate[key] is not None:
            yield name, f"{size(estimate[key]['total'])}, most while {estimate[key]['stage']}: {_parts(estimate[key])}"
    disk = estimate["disk"]
    spilled = f", activations {size(disk['spill'])} for the time" if disk["spill"] else ""
    output = size(sum(disk["output"].values()))
    yield "disk", f"{size(disk['total'])}: result {output}, work folder {size(disk['work'])}{spilled}"
    stages = ", ".join(f"{name} {seconds(took)}" for name, took in estimate["seconds"].items() if took >= 0.05)
    yield "works with", _working_words(found["working"], found["device"])
    yield "time", f"{seconds(estimate['total_seconds'])} as fast as this machine is now ({stages})"
    if found["minutes"]:
        yield "picked", found["minutes"]["words"]
    if found["earlier"]:
        yield "earlier runs here", f"estimates were off by: {found['earlier']}"


def _working_words(working: Mapping[str, Any], device: str) -> str:
    places = {"device": f"on {device}", "memory": "in RAM", "file": "in a file"}
    return f"{working['micro_tokens']} tokens at once; activations of all samples wait {places[working['keep']]}"


def _parts(memory: Mapping[str, Any]) -> str:
    from auto_round.report import size

    parts = [(name, value) for name, value in memory.items() if isinstance(value, int) and value and name != "total"]
    return ", ".join(f"{name} {size(value)}" for name, value in parts)
