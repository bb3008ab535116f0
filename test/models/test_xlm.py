"""XLM: attentions and feed-forwards in two lists that are called by turns."""

from contract import check_model
from tiny import tiny


def test_xlm(tmp_path, device):
    model = tiny("xlm")
    check_model(
        model, tmp_path, device, blocks={"transformer.attentions": 2, "transformer.ffns": 2}, layers=2 * 4 + 2 * 2
    )
