"""CPM-Ant: a position bias computed from segments, blocks four levels deep."""

from contract import check_model
from tiny import tiny


def test_cpmant(tmp_path, device):
    model = tiny("cpmant")
    check_model(model, tmp_path, device, blocks={"cpmant.encoder.layers": 2}, layers=2 * 7)
