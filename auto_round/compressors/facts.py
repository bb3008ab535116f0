"""What a run's result depends on: the identity of its work folder, so that only an equal run goes on with it."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from auto_round import __version__
from auto_round.compressors.weights import hash_config, hash_weights
from auto_round.settings import describe

if TYPE_CHECKING:
    from auto_round.compressors.base import Compressor


def facts_of(run: Compressor) -> dict[str, Any]:
    """Everything that the codes depend on, as far as it is known without running the model; plain values."""
    streamed, plan, tune = run.streamed, run.plan, run.tune
    topped_up = {"expert_topup": run.calibration.expert_topup} if run.calibration.expert_topup else {}
    return {
        **topped_up,
        "source": streamed.checkpoint.fingerprint() if streamed.is_streamed else hash_weights(run.model),
        "source_dir": str(run.source_dir or ""),
        "config": hash_config(run.model, run.source_dir),
        "dtype": str(getattr(run.model, "dtype", None)),
        "algorithm": run.algorithm_name,
        "settings": {**describe(tune), "iters": tune.iters, "seed": tune.seed},
        "attention": run.attention.asked(),
        "data": run.data.sha256 if run.data is not None and run.needs_data else None,
        "scheme": run.scheme.to_dict(),
        "layers": {name: layer.scheme.to_dict() for name, layer in plan.quantized().items()},
        "blocks": [list(stack) for stack in plan.blocks],
        "device": run.device.type,
        "halvings": run.working.halvings,
        "auto_round": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
