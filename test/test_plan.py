import pytest

from auto_round.plan import LayerInfo, PlanError, fit_group_size, make_plan, match_layers
from auto_round.schemes import parse_scheme

NAMES = [f"layers.{i}.{p}" for i in (0, 1, 10) for p in ("q_proj", "down_proj")]


def layers(**changes):
    return [LayerInfo(n, 64, 128, n.rsplit(".", 1)[0], **changes) for n in NAMES] + [
        LayerInfo("lm_head", 320, 64, None)
    ]


def plan(scheme="W4A16G32", infos=None, **rules):
    return make_plan(infos or layers(), [["layers.0", "layers.1", "layers.10"]], parse_scheme(scheme), **rules)


def test_default_reason_and_what_is_outside():
    made = plan()
    assert made.layers["layers.0.q_proj"].reason == "default"
    assert not made.layers["lm_head"].is_quantized
    assert made.layers["lm_head"].reason == "outside the blocks"
    assert set(made.quantized("layers.1")) == {"layers.1.q_proj", "layers.1.down_proj"}


def test_precedence_exact_then_last_pattern():
    made = plan(layer_config={"layers.1.q_proj": {"bits": 2}, "q_proj": {"bits": 8}, r".*1\.q_proj": "W3A16G32"})
    assert made.layers["layers.1.q_proj"].scheme.bits == 2
    assert made.layers["layers.0.q_proj"].scheme.bits == 8


def test_a_number_at_the_end_is_whole():
    assert match_layers("layers.1", NAMES) == ["layers.1.q_proj", "layers.1.down_proj"]


def test_ignored_layers_are_kept():
    made = plan(ignore_layers=["down_proj"])
    assert {n for n, p in made.layers.items() if p.is_quantized} == {n for n in NAMES if "q_proj" in n}
    assert "ignore_layers" in made.layers["layers.0.down_proj"].reason


@pytest.mark.parametrize("rules", [{"layer_config": {"q_prj": "W8A16"}}, {"ignore_layers": ["q_prj"]}])
def test_a_rule_that_matches_nothing_lists_near_misses(rules):
    with pytest.raises(PlanError, match=r"matches no layer.*q_proj"):
        plan(**rules)


def test_lm_head():
    made = plan(lm_head="lm_head", quant_lm_head=True)
    assert made.layers["lm_head"].is_quantized
    tied = [*layers()[:-1], LayerInfo("lm_head", 320, 64, None, tied=True)]
    with pytest.raises(PlanError, match="tie_word_embeddings"):
        plan(infos=tied, lm_head="lm_head", quant_lm_head=True)


@pytest.mark.parametrize(
    ("inputs", "wanted", "fits"),
    [(128, 32, 32), (192, 128, 96), (4096, 128, 128), (96, 128, -1), (100, 64, -1), (128, -1, -1), (128, 0, 0)],
)
def test_group_sizes_that_do_not_divide(inputs, wanted, fits):
    assert fit_group_size(inputs, wanted) == fits


def test_shapes_that_no_kernel_reads_are_kept():
    infos = [LayerInfo("a.odd", 33, 64, "a"), LayerInfo("a.even", 2048, 64, "a")]
    made = plan(infos=infos)
    assert not made.layers["a.odd"].is_quantized
    assert "33×64" in made.layers["a.odd"].reason
    assert (
        made.summary()
        == "Quantized 1/2 layers; kept 1: shape 33×64 is not a multiple of 32 (no kernel reads it) (a.odd)"
    )


def test_blocks_that_mostly_stay_are_an_error_unless_a_rule_says_so():
    infos = [LayerInfo("a.odd", 33, 64, "a"), LayerInfo("a.even", 64, 64, "a")]
    with pytest.raises(PlanError, match=r"Quantized 1/2 layers: only 66 %.*ignore_layers='odd'"):
        plan(infos=infos)
    assert plan(infos=infos, ignore_layers=["odd"]).layers["a.even"].is_quantized


def test_routers_are_kept():
    infos = [LayerInfo("a.gate", 64, 64, "a", role="router"), LayerInfo("a.up", 64, 64, "a")]
    assert plan(infos=infos).layers["a.gate"].reason.startswith("router")
    assert plan(infos=infos, layer_config={"a.gate": {"bits": 8}}).layers["a.gate"].scheme.bits == 8
