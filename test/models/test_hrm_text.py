"""HRM: two stacks that are run through again and again; queries and gates stored in one matrix."""

from contract import check_model
from tiny import tiny


def test_hrm_text(tmp_path, device):
    model = tiny("hrm_text")
    check_model(
        model, tmp_path, device, blocks={"model.L_module.layers": 2, "model.H_module.layers": 2}, layers=4 * (5 + 3)
    )
