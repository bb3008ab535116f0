"""The report of a run as one HTML page: no script, no external resource, readable in light and dark.

Pure: a report (the mapping that report.json holds) goes in, text comes out. Values of a report come from model folders
and data sets of others, so everything is escaped, and a value that is missing leaves its place empty.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from auto_round.schemes import GGUF_FAMILIES, GGUF_TYPES

CURVE_POINTS = 120  # more would not be seen in a curve of this width
CURVE_WIDTH, CURVE_HEIGHT = 220, 48

_STYLE = """
:root { color-scheme: light dark; --text: #1c2330; --soft: #5b6677; --back: #ffffff; --card: #f4f6f9;
  --line: #d8dee7; --good: #187a3d; --bad: #b3261e; --warn: #8a5a00; --curve: #2f6fd0; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e8f0; --soft: #98a3b5; --back: #14181f; --card: #1d232d;
  --line: #323b49; --good: #5cc98a; --bad: #ff8a80; --warn: #e6b450; --curve: #7fb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p.sub { color: var(--soft); margin: 0 0 1rem; overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem; }
.card b { display: block; font-size: 1.15rem; }
.card span { color: var(--soft); font-size: .85rem; }
table { border-collapse: collapse; width: 100%; }
.scroll { overflow-x: auto; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
.pairs th { width: 14rem; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.name, code { font-family: ui-monospace, monospace; font-size: .88em; overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; } .warn { color: var(--warn); }
.blocks { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem; }
.blocks figure { margin: 0; padding: .6rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
figcaption { font-size: .85rem; color: var(--soft); overflow-wrap: anywhere; }
figcaption b { color: var(--text); font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
polyline { fill: none; stroke: var(--curve); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
details summary { cursor: pointer; color: var(--soft); margin: .4rem 0; }
"""


def render_html(report: Mapping[str, Any]) -> str:
    """The page for a report; sections whose data is missing are left out."""
    sections = (
        ("", _head(report)),
        ("", _cards(report)),
        ("Warnings", _warnings(report.get("warnings") or ())),
        ("Checks", _checks(report.get("checks") or ())),
        ("Schemes chosen for the layers", _pairs(report.get("auto_scheme") or {})),
        ("Layers", _layers(report)),
        ("Kept in high precision (large)", _large_kept(report.get("large_kept") or ())),
        ("Loss of each block", _blocks(report.get("blocks") or ())),
        ("Tensors of the source", _pairs(report.get("ledger") or {})),
        ("Time", _times(report.get("times") or {})),
        ("Calibration data", _pairs(report.get("data") or {})),
        ("Settings", _pairs(report.get("settings") or {})),
        ("Versions and command", _pairs({**(report.get("versions") or {}), "command": report.get("command")})),
    )
    body = "\n".join(f"{f'<h2>{escape(title)}</h2>' if title else ''}{html}" for title, html in sections if html)
    title = escape(f"auto-round: {report.get('model', '')}")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


# ---- words for values, used by the command line too --------------------------------------------------------------


def size(nbytes: float | None) -> str:
    """1536000 → "1.5 MB" (decimal, as file managers and hubs count)."""
    if nbytes is None:
        return "?"
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def seconds(value: Any) -> str:
    """75.2 → "1 min 15 s"."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "?"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def rate_words(rate: Mapping[str, float] | None) -> str | None:
    """How fast the tuning steps ran beside one large matrix product on the same machine."""
    return f"{rate['fraction']:.0%} ({rate['flops'] / 1e9:.0f} GFLOP/s)" if rate else None


def total_seconds(times: Mapping[str, float]) -> float:
    """The whole of a run: what it says itself, or the sum of its stages."""
    stages = (value for name, value in times.items() if name != "quantize")  # calibrate and tune together
    return times["total"] if "total" in times else sum(stages)


def mib(value: float | None) -> str:
    """`1.5 GiB` for a number of MiB; empty for None."""
    if value is None:
        return ""
    return f"{value / 1024:.2f} GiB" if value >= 1024 else f"{value:.0f} MiB"


def figure(value: Any, digits: int = 4) -> str:
    """A number with `digits` significant digits; empty for None."""
    if value is None:
        return ""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


_FAMILIES = {"mx_fp": "MXFP", "mx_int": "MXINT", "nv_fp": "NVFP", "fp": "FP"}


def scheme_words(layer: Mapping[str, Any]) -> str:
    """ "4 bits, groups of 128" for a layer of a report."""
    if layer.get("status") != "quantized":
        return "as in the source"
    group = layer.get("group_size")
    size = f"blocks of {group[0]}×{group[1]}" if isinstance(group, (list, tuple)) else f"groups of {group}"
    groups = {"-1": "one scale a row", "0": "one scale"}.get(str(group), size)
    family = layer.get("data_type") or "int"
    words = (
        f"{_FAMILIES.get(family, family.upper())}{layer.get('bits')}"
        if family != "int"
        else f"{layer.get('bits')} bits"
    )
    if family in GGUF_FAMILIES:
        words = next(
            name for name, kind in GGUF_TYPES.items() if (kind.data_type, kind.bits) == (family, layer["bits"])
        )
    asymmetric = "" if layer.get("sym", True) or family in GGUF_FAMILIES else ", asymmetric"
    inputs = f", inputs in {layer['act_bits']} bits" if (layer.get("act_bits") or 16) < 16 else ""
    return f"{words}, {groups}{asymmetric}{inputs}"


def scheme_title(scheme: Any) -> str:
    """The scheme of a whole run, which a report holds by its fields or by its name."""
    if isinstance(scheme, Mapping):
        return scheme_words({**scheme, "status": "quantized" if (scheme.get("bits") or 16) <= 8 else "kept"})
    return "" if scheme is None else str(scheme)


def compress_names(names: Iterable[str]) -> list[str]:
    """Names that differ only in a number become one: `layers.[0-3].mlp`, `layers.[0-3].experts.[0-7].up`."""
    found, place = list(names), 0
    while any(len(_NUMBER.findall(name)) > place for name in found):
        shorter = _compress_at(found, place)
        place += len(shorter) == len(found)
        found = shorter
    return found


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def _compress_at(names: Iterable[str], place: int) -> list[str]:
    """Joins names that are equal but for their number of that place, counted from 0."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = next(itertools.islice(_NUMBER.finditer(name), place, None), None)
        key = (name[: match.start()], name[match.end() :]) if match else (name, "")
        groups.setdefault(key, []).extend([int(match[0])] if match else [])
    return [f"{before}{_ranges(numbers)}{after}" for (before, after), numbers in groups.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] → "[0-2,5]"; a single number stands for itself."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
    return f"[{text}]" if len(set(numbers)) > 1 else text


def group_layers(layers: Iterable[Mapping[str, Any]]) -> list[tuple[list[str], Mapping[str, Any]]]:
    """(compressed names, an example) of layers that share scheme and reason, in their order."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for layer in layers:
        key = tuple(
            str(layer.get(field))
            for field in ("status", "bits", "data_type", "act_bits", "group_size", "sym", "reason")
        )
        groups.setdefault(key, []).append(layer)
    return [(compress_names(str(one.get("name")) for one in group), group[0]) for group in groups.values()]


# ---- sections ----------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if isinstance(value, float):
        value = figure(value, 6)
    if isinstance(value, (list, tuple)):
        value = "; ".join(map(str, value))
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {one}" for key, one in value.items())
    return escape("" if value is None else str(value))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; columns in `numeric` are set flush right, the first is a name."""
    kinds = [' class="n"' if i in numeric else (' class="name"' if i == 0 else "") for i in range(len(head))]
    plain = ["" if i not in numeric else ' class="n"' for i in range(len(head))]
    top = "".join(f"<th{kind}>{escape(cell)}</th>" for kind, cell in zip(plain, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _pairs(values: Mapping[str, Any]) -> str:
    shown = [(escape(str(key)), _text(value)) for key, value in values.items() if value not in (None, "", [], ())]
    rows = "".join(f'<tr><th>{key}</th><td class="name">{value}</td></tr>\n' for key, value in shown)
    return f'<div class="scroll"><table class="pairs"><tbody>\n{rows}</tbody></table></div>' if rows else ""


def _times(times: Mapping[str, float]) -> str:
    stages = {name: seconds(value) for name, value in times.items() if name not in ("total", "quantize")}
    return _pairs({**stages, "total": seconds(total_seconds(times))}) if times else ""


def _head(report: Mapping[str, Any]) -> str:
    words = [scheme_title(report.get("scheme")), *(str(report.get(key) or "") for key in ("format", "folder"))]
    words = [word for word in words if word]
    return f'<h1>{_text(report.get("model"))}</h1>\n<p class="sub">{escape(" · ".join(words))}</p>'


def _cards(report: Mapping[str, Any]) -> str:
    done, total = report.get("quantized_layers") or (None, None)
    sizes, kl, top1 = report.get("sizes") or {}, report.get("kl"), report.get("top1")
    checks = report.get("checks") or ()
    failed = sum(not check.get("passed") for check in checks)
    facts = [
        ("layers quantized", f"{done} / {total}" if total is not None else None),
        ("KL divergence, nats per token", figure(kl) if kl is not None else None),
        ("top-1 agreement", f"{top1:.2%}" if isinstance(top1, (int, float)) else None),
        ("size", f"{size(sizes.get('source_bytes'))} → {size(sizes.get('output_bytes'))}" if sizes else None),
        ("time", seconds(total_seconds(report["times"])) if report.get("times") else None),
        ("tuning, of a large product's rate", rate_words(report.get("tuning_rate"))),
        ("peak memory, libraries included", mib(report.get("peak_memory_mb"))),
        ("of it after importing libraries", mib(report.get("import_memory_mb"))),
        ("checks", (f"{failed} failed" if failed else f"{len(checks)} passed") if checks else None),
    ]
    cards = [f'<div class="card"><b>{_text(value)}</b><span>{name}</span></div>' for name, value in facts if value]
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _warnings(warnings: Sequence[Any]) -> str:
    return "<ul>" + "".join(f'<li class="warn">{_text(one)}</li>' for one in warnings) + "</ul>" if warnings else ""


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    words = {True: '<span class="good">passed</span>', False: '<span class="bad">FAILED</span>'}
    rows = [(_text(c.get("name")), words[bool(c.get("passed"))], _text(c.get("detail"))) for c in checks]
    return _table(("check", "result", "detail"), rows) if rows else ""


def _layers(report: Mapping[str, Any]) -> str:
    layers = report.get("layers") or ()
    if not layers:
        return ""
    groups = [
        ("<br/>".join(map(escape, names)), escape(scheme_words(layer)), _text(layer.get("reason")))
        for names, layer in group_layers(layers)
    ]
    rows = [
        (_text(one.get("name")), escape(scheme_words(one)), _text(one.get("reason")), _text(one.get("numel")))
        for one in layers
    ]
    every = _table(("layer", "stored as", "reason", "parameters"), rows, numeric=(3,))
    return (
        f"{_table(('layers', 'stored as', 'reason'), groups)}"
        f"<details><summary>every layer ({len(rows)})</summary>{every}</details>"
    )


def _large_kept(tensors: Sequence[Mapping[str, Any]]) -> str:
    rows = [(_text(one.get("name")), _text(one.get("numel")), _text(one.get("reason"))) for one in tensors]
    return _table(("tensor", "parameters", "reason"), rows, numeric=(1,)) if rows else ""


def expert_words(blocks: Sequence[Mapping[str, Any]]) -> str:
    """How many calibration tokens reached the experts of these blocks; nothing for blocks without experts."""
    seen = [block["experts"] for block in blocks if block.get("experts")]
    if not seen:
        return ""
    total, rare = sum(one["experts"] for one in seen), sum(one["below_floor"] for one in seen)
    text = f"{total} experts, {min(one['least'] for one in seen)} to {max(one['most'] for one in seen)} tokens each"
    return text + (f"; {rare} below {seen[0]['floor']}" if rare else "")


def text_words(data: Mapping[str, Any]) -> str:
    """What the calibration text covers: `65536 tokens of 20 documents, 41% of the vocabulary; Latin 71%, Han 9%`."""
    words = f"{data['tokens']} tokens"
    if data.get("documents"):
        words += f" of {data['documents']} documents"
    if data.get("vocabulary_seen") is not None:
        words += f", {data['vocabulary_seen']:.0%} of the vocabulary"
    scripts = [f"{script} {share:.0%}" for script, share in list((data.get("scripts") or {}).items())[:3]]
    return f"{words}; {', '.join(scripts)}" if scripts else words


def _blocks(blocks: Sequence[Mapping[str, Any]]) -> str:
    return f'<div class="blocks">{"".join(map(_block, blocks))}</div>' if blocks else ""


def _block(block: Mapping[str, Any]) -> str:
    words = []
    if block.get("start_loss") is not None:
        words.append(f"loss {figure(block['start_loss'])} → {figure(block.get('final_loss'))}")
    if block.get("layers") is not None:
        words.append(f"{block['layers'] if isinstance(block['layers'], int) else len(block['layers'])} layers")
    if block.get("resumed"):
        words.append("from an earlier run")
    if block.get("experts"):
        words.append(expert_words([block]))
    if block.get("note"):
        words.append(str(block["note"]))
    caption = f"<b>{_text(block.get('name'))}</b><br/>{escape(', '.join(words))}"
    return f"<figure>{loss_curve(block.get('losses') or ())}<figcaption>{caption}</figcaption></figure>"


def loss_curve(losses: Sequence[Sequence[Any]]) -> str:
    """An SVG line of (iteration, loss) points, from zero upwards; empty for fewer than two finite points."""
    points = [(float(step), float(loss)) for step, loss in losses if _is_finite(loss)]
    if len(points) < 2:
        return ""
    stride = math.ceil(len(points) / CURVE_POINTS)
    points = [*points[:-1:stride], points[-1]]
    first, last, top = points[0][0], points[-1][0], max(loss for _, loss in points)
    across = CURVE_WIDTH / max(last - first, 1e-12)
    up = (CURVE_HEIGHT - 4) / max(top, 1e-30)
    line = " ".join(f"{(x - first) * across:.1f},{CURVE_HEIGHT - 2 - y * up:.1f}" for x, y in points)
    label = f"loss {points[0][1]:.4g} to {points[-1][1]:.4g} over {last:.0f} iterations"
    return (
        f'<svg viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" role="img" aria-label="{label}">'
        f'<title>{label}</title><polyline points="{line}"/></svg>'
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
