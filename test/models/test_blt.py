"""BLT: a patcher, an encoder of bytes, a model of patches and a decoder, with lists of cross attention between."""

from contract import check_model
from tiny import tiny


def test_blt(tmp_path, device):
    model = tiny("blt")
    check_model(
        model,
        tmp_path,
        device,
        blocks={
            "model.patcher.layers": 2,
            "model.local_encoder.layers": 1,
            "model.local_encoder.cross_attn_layers": 1,
            "model.global_transformer.layers": 2,
            "model.local_decoder.cross_attn_layers": 2,
            "model.local_decoder.layers": 2,
        },
        layers=2 * 7 + 7 + 4 + 2 * 7 + 2 * 4 + 2 * 7,
    )
