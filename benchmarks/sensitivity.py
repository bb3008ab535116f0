"""What AutoScheme expects of a scheme in a layer, held against what happens: one layer rounded at a time.

Sensitivities are measured on calibration text as a run does it. Then each layer is rounded alone, with each option, and
the divergence from the original is measured on held-out text. Printed are, for each option, the correlation of the
logarithms over all layers, by what factor the two are apart, and both sums.

    python benchmarks/sensitivity.py MODEL --calib calib.jsonl --test test.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from quality import log_probabilities, test_windows
from transformers import AutoModelForCausalLM

from auto_round import AutoRound, AutoScheme
from auto_round.algorithms.base import oriented
from auto_round.auto_scheme.sensitivity import measure
from auto_round.compressors.chain import inputs_of
from auto_round.data_type import data_type
from auto_round.data_type.base import WeightTask
from auto_round.plan import LayerPlan, fit_scheme

OPTIONS = "W2A16,W4A16,W8A16"
WINDOWS = 8


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--schemes", default=OPTIONS)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    return parser.parse_args()


def agreement(expected: list[float], happened: list[float]) -> str:
    """Correlation of the logarithms, and by what factor they are apart in the root mean square."""
    both = torch.tensor([expected, happened]).clamp(min=1e-12).log()
    apart = (both[0] - both[1]).square().mean().sqrt().exp()
    return f"correlation {torch.corrcoef(both)[0, 1]:.3f}, apart by a factor of {apart:.2f}"


def main() -> None:
    options = read_options()
    auto = AutoScheme(8.0, options.schemes)
    run = AutoRound(
        str(options.model),
        scheme=auto,
        iters=0,
        dataset=options.calib,
        nsamples=options.samples,
        seqlen=options.seqlen,
        device_map="cpu",
        show_progress=False,
    )
    run.load_data()
    plans = {
        name: [fit_scheme(plan.info, scheme, label) for label, scheme in auto.schemes.items()]
        for name, plan in run.plan.quantized().items()
    }
    native = run.observe_original()
    found = measure(run.streamed, plans, run.samples, native, run.amp, search=True, seed=run.tune.seed)
    happened = happens(options, run.samples, plans)
    for index, label in enumerate(auto.schemes):
        pair = [row[index] for row in found.losses.values()], [row[index] for row in happened.values()]
        print(f"{label}: {agreement(*pair)}; sums {sum(pair[0]):.5f} and {sum(pair[1]):.5f}")


@torch.no_grad()
def happens(
    options: argparse.Namespace, samples: list[dict[str, torch.Tensor]], plans: Mapping[str, list[LayerPlan]]
) -> dict[str, list[float]]:
    """The divergence from the original on held-out text, of each layer rounded alone with each option."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    layers = {name: model.get_submodule(name) for name in plans}
    with inputs_of(layers) as seen:
        for sample in samples:
            model(**sample, use_cache=False)
    ids = test_windows(options.model, options.test)
    ids = ids[:: max(1, len(ids) // WINDOWS)][:WINDOWS]
    want = log_probabilities(model, ids)
    found: dict[str, list[float]] = {}
    for name, layer in layers.items():
        kept = layer.weight.clone()
        for plan in plans[name]:
            task = WeightTask(oriented(kept, plan), plan.scheme.weight, seen[name].mean_square, search=True)
            rounded = data_type(plan.scheme.data_type).quantize(task).dequantize()
            layer.weight.copy_(oriented(rounded, plan))
            got = log_probabilities(model, ids)
            found.setdefault(name, []).append((want.exp() * (want - got)).sum(-1).mean().item())
        layer.weight.copy_(kept)
    return found


if __name__ == "__main__":
    main()
