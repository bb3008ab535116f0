"""The HTML report: well-formed, self-contained, escaped, and complete for whatever a run leaves out."""

import json
import math
from xml.etree import ElementTree

import pytest

from auto_round.report import (
    CURVE_POINTS,
    compress_names,
    group_layers,
    loss_curve,
    render_html,
    scheme_words,
    seconds,
    size,
    total_seconds,
)

HOSTILE = "<script>alert('x')</script> & \"quotes\" [bold]"


def layer(name: str, status: str = "quantized", reason: str = "default") -> dict:
    bits = 4 if status == "quantized" else 16
    return {
        "name": name,
        "bits": bits,
        "group_size": 128,
        "sym": True,
        "status": status,
        "reason": reason,
        "numel": 4096,
    }


def full_report(text: str = "plain") -> dict:
    return {
        "model": text,
        "scheme": {"bits": 4, "group_size": 128, "sym": True},
        "format": "auto_round",
        "folder": f"out/{text}",
        "layers": [layer(f"model.layers.{i}.{text}") for i in range(3)] + [layer("lm_head", "kept", text)],
        "quantized_layers": [3, 4],
        "large_kept": [{"name": text, "numel": 2_000_000, "reason": text}],
        "blocks": [
            {
                "name": text,
                "layers": 7,
                "start_loss": 1.5,
                "final_loss": 0.5,
                "losses": [[i, 1.5 - i / 200] for i in range(200)],
                "note": text,
                "resumed": True,
            },
            {"name": "untuned", "layers": ["a"], "start_loss": None, "final_loss": None, "losses": []},
        ],
        "data": {"source": text, "samples": 4, "tokens": 512, "seqlen": 128, "sha256": "ab", "notes": [text, text]},
        "checks": [
            {"name": "ledger", "passed": True, "detail": text},
            {"name": "layout", "passed": False, "detail": text},
        ],
        "kl": 0.0123,
        "top1": 0.876,
        "ledger": {"quantized": 3, "kept": 1, "tied": 0, "transformed": 0, "dropped": 0},
        "sizes": {"source_bytes": 1_000_000, "output_bytes": 300_000},
        "times": {"load": 1.0, "calibrate": 2.0, "tune": 100.0, "quantize": 102.0, "export": 1.0, "verify": 1.0},
        "peak_memory_mb": 2048,
        "import_memory_mb": 300,
        "settings": {"iters": 200, text: text},
        "versions": {"torch": "2.13.0"},
        "command": f"auto-round {text}",
        "warnings": [text],
    }


def parse(html: str) -> ElementTree.Element:
    assert html.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>\n"))


def test_page_is_well_formed_and_complete():
    html = render_html(full_report())
    text = " ".join(parse(html).itertext())
    for expected in ("3 / 4", "0.0123", "87.60%", "1.0 MB → 300.0 kB", "1 min 45 s", "2.00 GiB", "1 failed", "FAILED"):
        assert expected in text
    for title in ("Warnings", "Checks", "Layers", "Loss of each block", "Time", "Calibration data", "Settings"):
        assert f"<h2>{title}</h2>" in html
    assert "model.layers.[0-2].plain" in text
    assert len(list(parse(html).iter("svg"))) == 1  # the untuned block has no curve


def test_everything_is_escaped():
    html = render_html(full_report(HOSTILE))
    text = " ".join(parse(html).itertext())
    assert "<script" not in html and html.count("&lt;script&gt;") >= 12
    assert HOSTILE in text


def test_page_needs_nothing_from_outside():
    html = render_html(full_report())
    for word in ("http:", "https:", "src=", "href=", "@import", "url(", "<link", "<script"):
        assert word not in html
    assert "prefers-color-scheme: dark" in html


def test_missing_parts_leave_their_sections_out():
    text = " ".join(parse(render_html({})).itertext())
    assert "Layers" not in text and "Checks" not in text
    for name in full_report():
        parse(render_html({**full_report(), name: None}))
        parse(render_html({key: value for key, value in full_report().items() if key != name}))


def test_report_survives_json():
    report = json.loads(json.dumps(full_report()))
    assert render_html(report) == render_html(full_report())


def test_loss_curve():
    assert loss_curve([]) == loss_curve([[0, 1.0]]) == ""
    assert loss_curve([[0, None], [1, math.nan], [2, math.inf], [3, 1.0]]) == ""
    points = loss_curve([[i, 1.0 / (i + 1)] for i in range(1000)]).split('points="')[1].split('"')[0].split()
    assert len(points) <= CURVE_POINTS + 1
    assert points[0].startswith("0.0,") and points[-1].startswith("220.0,")
    heights = [float(point.split(",")[1]) for point in points]
    assert heights == sorted(heights) and min(heights) >= 0 and max(heights) <= 48  # loss falls, so the line does
    ElementTree.fromstring(loss_curve([[0, 0.0], [1, 0.0]]))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["lm_head"], ["lm_head"]),
        (["a.0.q", "a.1.q", "a.2.q", "a.4.q"], ["a.[0-2,4].q"]),
        (["a.0.q", "a.0.k1", "a.1.q", "a.1.k1"], ["a.[0-1].q", "a.[0-1].k1"]),
        ([f"l.{i}.experts.{j}.up" for i in range(3) for j in range(4)], ["l.[0-2].experts.[0-3].up"]),
        (["a.7.q"], ["a.7.q"]),
        ([], []),
    ],
)
def test_names_are_compressed(names, expected):
    assert compress_names(names) == expected


def test_layers_are_grouped_by_scheme_and_reason():
    layers = [layer("a.0.q"), layer("a.1.q"), layer("h", "kept", "outside"), {**layer("a.0.k"), "bits": 8}]
    assert [names for names, _ in group_layers(layers)] == [["a.[0-1].q"], ["h"], ["a.0.k"]]


def test_words():
    assert [size(n) for n in (None, 12, 1536, 2.5e6, 7e12)] == ["?", "12 B", "1.5 kB", "2.5 MB", "7.0 TB"]
    assert [seconds(n) for n in (None, 2, 75.2, 7260)] == ["?", "2.0 s", "1 min 15 s", "2 h 1 min"]
    assert total_seconds({"tune": 2.0, "quantize": 3.0, "export": 1.0}) == 3.0
    assert total_seconds({"tune": 2.0, "total": 9.0}) == 9.0
    assert scheme_words({**layer("a"), "group_size": -1, "sym": False}) == "4 bits, one scale a row, asymmetric"
    assert scheme_words(layer("a", "kept")) == "as in the source"


def test_names_of_a_single_block_are_joined_at_a_later_number():
    names = [f"mtp.layers.0.mlp.experts.{expert}.up_proj" for expert in range(8)]
    assert compress_names(names) == ["mtp.layers.0.mlp.experts.[0-7].up_proj"]
