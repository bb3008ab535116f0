"""LongCat Flash: two attentions and two feed-forwards in a block, experts that do nothing among the others."""

from contract import check_model
from tiny import tiny


def test_longcat_flash(tmp_path, device):
    model = tiny("longcat_flash")
    check_model(
        model, tmp_path, device, blocks={"model.layers": 2}, layers=2 * (2 * 5 + 2 * 3 + 4 * 3 + 2 * 2), fused=2
    )
