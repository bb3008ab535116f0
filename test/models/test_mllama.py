"""Mllama: blocks of cross attention among the others, which text alone does not reach."""

from contract import check_model
from tiny import tiny

from auto_round import AutoRound


def test_mllama(tmp_path, device):
    model = tiny("mllama", "ImageTextToText")
    check_model(model, tmp_path, device, blocks={"model.language_model.layers": 2}, layers=2 * (4 + 3))


def test_blocks_that_text_does_not_reach():
    model = tiny("mllama", "ImageTextToText")
    run = AutoRound(model, None, scheme="W4A16", group_size=32, iters=0, disable_opt_rtn=True)
    missed = [plan for name, plan in run.plan.layers.items() if "language_model.layers.1." in name]
    assert len(missed) == 4 + 3
    assert run.warnings or all(plan.is_quantized or plan.reason != "outside the blocks" for plan in missed)
