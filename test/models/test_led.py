"""LED: windows and global tokens in the encoder."""

from contract import check_model
from tiny import tiny


def test_led(tmp_path, device):
    model = tiny("led", "Seq2SeqLM")
    check_model(
        model,
        tmp_path,
        device,
        blocks={"led.encoder.layers": 2, "led.decoder.layers": 2},
        layers=2 * (6 + 1 + 2) + 2 * (8 + 2),
    )
