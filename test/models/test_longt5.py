"""LongT5: local attention in the encoder."""

from contract import check_model
from tiny import tiny


def test_longt5(tmp_path, device):
    model = tiny("longt5", "Seq2SeqLM")
    check_model(
        model, tmp_path, device, blocks={"encoder.block": 2, "decoder.block": 2}, layers=2 * (4 + 2) + 2 * (8 + 2)
    )
