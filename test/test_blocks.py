"""The work on one block: what it is given is its own, however often and in whatever order blocks are called."""

from tiny import save_tiny, tiny, token_ids

from auto_round import AutoRound, wrapper


def test_a_block_that_is_called_again_keeps_the_scales_of_its_inputs(tmp_path, monkeypatch):
    """HRM runs through two stacks in turn: before a block's second call, other blocks have been quantized."""
    scales = []

    class Watched(wrapper.InputQuantizer):
        def __init__(self, spec, input_scale=None):
            super().__init__(spec, input_scale)
            scales.append(input_scale)

    monkeypatch.setattr(wrapper, "InputQuantizer", Watched)
    given = {"dataset": token_ids(2), "nsamples": 2, "seqlen": 16, "batch_size": 1, "iters": 1}
    folder = str(save_tiny(tiny("hrm_text"), tmp_path / "model"))
    run = AutoRound(folder, scheme="FP8_STATIC", device_map="cpu", show_progress=False, **given)
    run.quantize()
    assert len(run.native.places) > len(run.plan.block_names) > 0
    assert scales and all(scale is not None for scale in scales)
