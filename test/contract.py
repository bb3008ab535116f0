"""What every model must pass: blocks found, calibration, quantization of its blocks, saving, reloading, logits.

Sizes and names are judged from the files alone: what the source holds, what the artifact holds. The bound on the
logits is that of plain rounding to nearest, done here on the model's own parameters, without auto_round.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import save_tiny, text_samples
from torch import nn

from auto_round import AutoRound
from auto_round.calibration.native import logits_of
from auto_round.doctor.tiny import text_batch, text_module

GROUP = 32
COVERAGE, SLOPE, SLACK = 0.95, 2.5, 0.02
MASKED = 1e4  # columns of the logits that a model masks hold the least number of the dtype
NO_MATRIX = re.compile(r"A_log|position|table|norm|_embed")  # 2-D, and not used in a product

Tensors = dict[str, torch.Tensor]


@dataclass
class Contract:
    """What a run through the contract leaves for further checks.

    run: the compressor; model: the reloaded quantized model; source, stored: tensors of the two folders by name;
    layers: stored names of the quantized layers.
    """

    run: Any
    model: Any
    source: Tensors
    stored: Tensors

    @property
    def layers(self) -> list[str]:
        return [name.removesuffix(".qweight") for name in self.stored if name.endswith(".qweight")]

    def kept(self) -> dict[str, str]:
        """Layers inside the blocks that are not quantized, with the reason."""
        return {name: plan.reason for name, plan in self.run.plan.kept().items() if plan.info.block}


def check_model(
    model: Any,
    folder: Path,
    device: str,
    blocks: Mapping[str, int] | None = None,
    layers: int | None = None,
    fused: int = 0,
    iters: int = 2,
    files: Mapping[str, bytes] | None = None,
    **options: Any,
) -> Contract:
    """Run the whole contract on a tiny random model.

    Args:
        blocks: what must be found: the name of each stack, in the order in which they run, and its length.
        layers: number of layers that must be planned for quantization.
        fused: number of modules of fused experts that must be taken apart.
        files: what stands beside the weights and must be carried over.
        options: for `AutoRound`, beside the ones that make it quick.
    """
    source = save_tiny(model, folder / "source", tokenizer=False)  # samples are ids
    for name, data in (files or {}).items():
        (source / name).write_bytes(data)
    model = type(model).from_pretrained(source, dtype="auto").eval()  # tables that are computed are not stored
    run = AutoRound(
        str(source),
        scheme="W4A16",
        group_size=GROUP,
        dataset=text_samples(model),
        nsamples=8,
        seqlen=32,
        batch_size=4,
        iters=iters,
        amp=False,
        device_map=device,
        show_progress=False,
        **options,
    )
    check_plan(run, blocks, layers, fused)
    quantize_blocks(run)
    _, out = run.save_quantized(folder / "out", return_folders=True)
    assert all(check["passed"] for check in run.report["checks"]), run.report["checks"]

    loaded = type(model).from_pretrained(out, dtype="auto").eval()
    result = Contract(run, loaded.to(device), read_folder(source), read_folder(Path(out)))
    check_nothing_lost(result)
    assert all(
        (Path(out) / name).read_bytes() == (source / name).read_bytes() for name in ("NOTICE.txt", *(files or {}))
    )
    matrices = dict(block_matrices(model, run.plan.block_names))
    check_coverage(result, matrices)
    check_logits(model, result.model, matrices, device)
    return result


# ---- plan and run ------------------------------------------------------------------------------------------------


def check_plan(run: Any, blocks: Mapping[str, int] | None, layers: int | None, fused: int) -> None:
    if blocks is not None:
        expected = [[f"{stack}.{number}" for number in range(length)] for stack, length in blocks.items()]
        assert [list(stack) for stack in run.plan.blocks] == expected
    assert len(run.streamed.replaced) == fused, sorted(run.streamed.replaced)
    if layers is not None:
        assert len(run.plan.quantized()) == layers, sorted(run.plan.quantized())
    assert all(plan.reason for plan in run.plan.layers.values())


def quantize_blocks(run: Any) -> None:
    """Unfused = fused, then the blocks one after the other."""
    run.calib()
    exact = run.model.dtype == torch.float32
    assert run.native.replacement_error < (1e-5 if exact else 2e-2)
    missed = set(run.plan.block_names) - set(run.native.blocks)  # towers may run beside them
    assert not missed or any("not reached" in warning for warning in run.warnings)
    run._quantize_blocks()
    assert all(run.store.has(block) for block in run.plan.block_names if run.plan.quantized(block))
    assert {entry["name"] for entry in run.block_log} == set(run.plan.block_names)


# ---- the folder --------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def check_nothing_lost(result: Contract) -> None:
    """Each source tensor is in the artifact byte for byte, or quantized, or in what became of fused ones.

    A layer's stored name is that of its weight in the source, unless the source has none for it.
    """
    layers, groups = set(result.layers), result.run.streamed.names.groups.values()
    written = {name for group in groups for name in group.written.values()}
    regrouped = {name for group in groups for name in group.sources}
    for layer in layers:
        assert f"{layer}.weight" in result.source or f"{layer}.weight" in written, f"{layer}: no such source tensor"
    for name, tensor in result.source.items():
        if name.removesuffix(".weight") in layers:
            assert name not in result.stored, f"{name} is stored twice"
        elif name in result.stored:
            assert same_bytes(tensor, result.stored[name]), f"{name} has changed"
        else:
            assert name in regrouped, f"{name} is lost"
    for group in groups:
        if not set(group.sources) & result.stored.keys():
            size = sum(numel(result, name) for name in set(group.written.values()))
            assert size == sum(result.source[name].numel() for name in group.sources), f"{group.sources[0]}: not whole"


def numel(result: Contract, name: str) -> int:
    """Elements of a tensor of the artifact, packed or not."""
    packed = result.stored.get(f"{name.removesuffix('.weight')}.qweight")
    return result.stored[name].numel() if packed is None else packed.numel() * 8


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor


# ---- the weights of the blocks ------------------------------------------------------------------------------------


def block_matrices(model: nn.Module, blocks: tuple[str, ...]) -> Iterator[tuple[str, tuple[nn.Parameter, int]]]:
    """Matrices of the blocks: name → (parameter, dimension that runs over the inputs); shared ones once."""
    seen: set[int] = set()
    for block in blocks:
        for path, module in model.get_submodule(block).named_modules(prefix=block):
            if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
                continue
            turned = type(module).__name__ == "Conv1D" or getattr(module, "is_transposed", False) is True
            for name, parameter in module.named_parameters(path, recurse=False):
                matrix = parameter.dim() in (2, 3) and min(parameter.shape[-2:]) >= 32 and id(parameter) not in seen
                if matrix and not NO_MATRIX.search(name[len(block) :]):
                    seen.add(id(parameter))
                    yield name, (parameter, -2 if turned else -1)


def check_coverage(result: Contract, matrices: Mapping[str, tuple[nn.Parameter, int]]) -> None:
    """At least 95 % of the block weights are stored quantized; what is left has its reason."""
    routers = {f"{name}.weight" for name, reason in result.kept().items() if reason.startswith("router")}
    total = sum(parameter.numel() for name, (parameter, _) in matrices.items() if name not in routers)
    stored = sum(result.stored[f"{layer}.qweight"].numel() * 8 for layer in result.layers)
    assert stored >= COVERAGE * total, f"{stored / total:.1%} of the block weights are quantized; {result.kept()}"
    reported = {layer["name"]: layer for layer in result.run.report["layers"]}
    assert all(reported[name]["reason"] for name in result.kept())


@torch.no_grad()
def rounded(model: nn.Module, matrices: Mapping[str, tuple[nn.Parameter, int]]) -> nn.Module:
    """A copy of the model, rounded to nearest: the largest of each group of 32 becomes -8 of -8 … 7."""
    other = copy.deepcopy(model)
    for name, (_, dim) in matrices.items():
        weight = other.get_parameter(name)
        columns = weight.movedim(dim, -1)
        groups = columns.reshape(-1, GROUP if columns.shape[-1] % GROUP == 0 else columns.shape[-1])
        largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
        scale = torch.where(largest == 0, 1.0, largest / -8)
        codes = (groups / scale).round().clamp(-8, 7)
        weight.copy_((codes * scale).reshape(columns.shape).movedim(-1, dim))
    return other


# ---- logits ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: nn.Module, batch: Tensors) -> torch.Tensor:
    found = logits_of(text_module(model)(**batch)).float()
    return torch.where(found.abs() < MASKED, found, 0.0)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


def check_logits(model: nn.Module, loaded: nn.Module, matrices: Mapping[str, Any], device: str) -> None:
    """Not much worse than plain rounding to nearest of the same weights."""
    batch = {key: value.to(device) for key, value in text_batch(model, 2, 24, seed=1).items()}
    simple = rounded(model, matrices).to(device)
    want = logits(model.to(device), batch)
    error, bound = relative(logits(loaded, batch), want), relative(logits(simple, batch), want)
    assert error <= SLOPE * bound + SLACK, (error, bound)
