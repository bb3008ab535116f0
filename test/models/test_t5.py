"""T5: an encoder and a decoder; the position bias of the first block is handed on to the others."""

from contract import check_model
from tiny import tiny


def test_t5(tmp_path, device):
    model = tiny("t5", "Seq2SeqLM")
    check_model(
        model, tmp_path, device, blocks={"encoder.block": 2, "decoder.block": 2}, layers=2 * (4 + 2) + 2 * (8 + 2)
    )
