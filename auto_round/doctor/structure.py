"""The checks of what a model is made of: configuration, clone, forward, blocks, layers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from auto_round.calibration.discover import called_blocks, used_as_matrices
from auto_round.calibration.native import relative
from auto_round.doctor import anatomy
from auto_round.doctor.clone import make_clone, read_source, save_clone
from auto_round.doctor.context import BATCH, GROUP, ITERS, LENGTH, SAMPLES, Context, adapt, find_inputs, logits
from auto_round.doctor.finding import WARNING, Finding, Symptom, listed, message, patterns, where, wrong_names
from auto_round.doctor.tiny import tiny_config
from auto_round.inference.load import load_model
from auto_round.modeling.blocks import find_stacks, get_block_names
from auto_round.modeling.checkpoint import CheckpointError
from auto_round.plan import PACK, PlanError
from auto_round.special_model_handler import FORWARDS, model_traits
from auto_round.utils.common import is_supported_layer
from auto_round.utils.model import MIN_COVERAGE, block_matrices, build_empty, find_routers, outline

SAME_MODEL = 1e-3  # relative difference of the logits after Transformers has saved and loaded the clone
_NOISE = ("transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype", "auto_map")


def check_configuration(ctx: Context) -> Finding:
    try:
        ctx.source = read_source(ctx.subject, ctx.work, ctx.trust)
    except Exception as error:
        text = str(error)
        remedy = "correct what was given, or download the model again"
        if "trust_remote_code" in text:
            remedy = "read the model's code, then pass --trust_remote_code (trust_remote_code=True)"
        elif "does not recognize this architecture" in text:
            remedy = "update Transformers, or use a copy of the model that brings its code (--trust_remote_code)"
        elif "is not valid JSON" not in text and "neither" not in text and "config.json" not in text:
            remedy = "compare config.json with the fields that the configuration's class takes"
        words = "the configuration cannot be read"
        raise Symptom(message(error), symptom=words, remedy=remedy) from error
    config = ctx.source.config
    remote = bool(getattr(config, "auto_map", None)) and type(config).__module__.startswith("transformers_modules")
    facts = {
        "model_type": config.model_type,
        "config_class": [type(config).__module__, type(config).__name__],
        "source": str(ctx.subject) if not isinstance(ctx.subject, (PreTrainedConfig, torch.nn.Module)) else "",
        "remote_code": remote,
    }
    own = ", with code of its own" if remote else ""
    return Finding(
        "configuration", detail=f"{type(config).__name__}, model type {config.model_type!r}{own}", facts=facts
    )


def check_clone(ctx: Context) -> Finding:
    try:
        clone = make_clone(ctx.source, ctx.trust)
    except Exception as error:
        raise _no_clone(ctx, error) from error
    try:
        ctx.saved = save_clone(clone, ctx.work / "source", ctx.source.folder)
        model = load_model(ctx.saved, ctx.trust)
    except Exception as error:
        remedy = "if a file is missing, give the model's folder with that file in it; otherwise mend the model's class"
        words = "Transformers does not load what it saved"
        raise Symptom(f"{where(error)[0]}{message(error)}", symptom=words, remedy=remedy) from error
    ctx.model = model
    size = sum(parameter.numel() for parameter in model.parameters())
    small = clone.config.to_diff_dict()
    if _plain(type(clone.config).from_dict(dict(small))) != _plain(clone.config):
        small = clone.config.to_dict()
    facts = {
        "class": [type(model).__module__, type(model).__name__],
        "config": {key: value for key, value in small.items() if key not in _NOISE},
        "parameters": size,
        "layers": outline(model),
    }
    detail = f"{type(model).__name__}, {size / 1e6:.2f} M parameters: {outline(model)}"
    if type(model) is not type(clone):
        detail += f"; Transformers' tables load this class, the configuration names {type(clone).__name__}"
    return Finding("tiny clone", detail=detail, facts=facts)


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _NOISE}


def _no_clone(ctx: Context, error: Exception) -> Symptom:
    """Why no clone was built: what is missing here, the class itself, or sizes that do not fit each other."""
    config, words = ctx.source.config, "no tiny clone can be built"
    if isinstance(error, ImportError):
        return Symptom(message(error), symptom=words, remedy="install the package that the model's code imports")
    if "trust_remote_code" in str(error) or "has no text-generating class" in str(error):
        remedy = "update Transformers, or pass --trust_remote_code for a model with code of its own"
        return Symptom(message(error), symptom=words, remedy=remedy)
    place = where(error)[0]
    try:
        build_empty(config, torch.float32, ctx.trust)
    except Exception as other:
        remedy = f"mend the configuration: {type(config).__name__} and the model's class do not agree"
        return Symptom(
            f"at its full size the model cannot be built either: {message(other)}", symptom=words, remedy=remedy
        )
    try:
        sizes = tiny_config(config).to_diff_dict()
    except Exception:
        sizes = {}
    remedy = (
        f"the shrunken sizes do not fit each other: add the field to EXCEPTIONS[{config.model_type!r}] in "
        "auto_round/doctor/sizes.py"
    )
    return Symptom(f"{place}{message(error)}", symptom=words, remedy=remedy, facts={"config": sizes})


def check_forward(ctx: Context) -> Finding:
    model = ctx.model
    try:
        ctx.batch, ctx.samples = find_inputs(model)
        found = logits(model, ctx.batch)
    except Exception as error:
        names = anatomy.signature(model)
        if lost := anatomy.unregistered(model):
            raise _plain_list(lost) from error
        raise Symptom(
            f"{ctx.class_name}.forward{names} does not run on text: {where(error, [model])[0]}{message(error)}",
            "forward",
            symptom="a forward over text fails",
            facts={"forward": anatomy.forward_parameters(model)},
        ) from error
    if not torch.isfinite(found).all() or found.norm() == 0:
        kind = "all zero" if found.norm() == 0 else "not finite"
        raise Symptom(
            f"the logits of the clone are {kind}",
            "forward",
            symptom="wrong outputs",
            facts={"forward": anatomy.forward_parameters(model)},
        )
    ctx.logits = found
    inputs = {name: list(tensor.shape) for name, tensor in ctx.batch.items()}
    extra = [name for name in inputs if name not in ("input_ids", "decoder_input_ids")]
    detail = f"takes {', '.join(inputs)}; logits {list(found.shape)}"
    detail += f"; text alone is not enough, it needs {', '.join(extra)}" if extra else ""
    if ctx.model_type in FORWARDS:
        detail += "; a custom forward stands in for the model's own"
    return _reloads_itself(
        ctx,
        Finding("text forward", detail=detail, facts={"inputs": inputs, "forward": anatomy.forward_parameters(model)}),
    )


def _reloads_itself(ctx: Context, finding: Finding) -> Finding:
    """A warning where a second load, or a second call, gives another output, which later checks would stumble over."""
    first = logits(load_model(ctx.saved, ctx.trust), ctx.batch)
    if relative(first, ctx.logits) <= SAME_MODEL:
        return finding
    finding.status = WARNING
    if relative(logits(load_model(ctx.saved, ctx.trust), ctx.batch), first) <= SAME_MODEL:
        ctx.logits = first
        finding.symptom = "a second call gives another output"
        finding.cause = f"{ctx.class_name} keeps something from one call for the next"
        finding.remedy = "see the check of replay; what a block remembers must be reset by a custom forward"
    else:
        finding.symptom = "Transformers does not load what it saved"
        finding.cause = "loaded twice, the clone gives two results: some of its weights are not in the checkpoint"
        finding.remedy = "in the model's class: register every parameter, and initialise those that are not stored"
    return finding


# ---- blocks and layers --------------------------------------------------------------------------------------------


def check_blocks(ctx: Context) -> Finding:
    """Also makes the compressor, whose own complaint is kept for the checks that explain it."""
    _make_run(ctx)
    ctx.adapted = adapt(ctx.model)
    model = ctx.adapted.model
    handler = model_traits(model).block_handler is not None
    if ctx.run is not None:
        stacks, how = [list(stack) for stack in ctx.run.plan.blocks], "module tree and a forward over text"
    else:
        stacks, how = find_stacks(model) and get_block_names(model), "module tree"
        if not stacks:
            stacks, how = anatomy.listed_stacks(model), "module tree, whatever its layers are"
    how = f"handler SPECIAL_MULTIMODAL_BLOCK[{ctx.model_type!r}]" if handler else how
    loose = _executed(ctx, anatomy.alike_siblings(model, [name for stack in stacks for name in stack]))
    hidden = anatomy.weight_in(model, [name for group in loose for name in group])
    if not stacks or hidden > anatomy.weight_in(model, [name for stack in stacks for name in stack]):
        raise _no_blocks(ctx, loose)
    ctx.stacks = stacks
    others = anatomy.stack_names(anatomy.other_stacks(model, stacks))
    kinds = {name: type(model.get_submodule(name)).__name__ for name in ctx.blocks}
    detail = f"{', then '.join(anatomy.stack_names(stacks))} ({', '.join(dict.fromkeys(kinds.values()))}), by {how}"
    detail += f"; not text: {', '.join(others)}" if others else ""
    facts = {"stacks": stacks, "classes": kinds, "how": how, "others": others}
    if ctx.run is not None and ctx.run.warnings:
        facts["warnings"] = list(ctx.run.warnings)
    return Finding("blocks", detail=detail, facts=facts)


def _executed(ctx: Context, groups: list[list[str]]) -> list[list[str]]:
    """Those groups of modules that the batch reaches: what only images reach does not count."""
    seen: set[str] = set()
    model = ctx.adapted.model
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: seen.add(name))
        for group in groups
        for name in group
    ]
    with contextlib.suppress(Exception):  # the check of the forward has told what is wrong
        logits(model, ctx.batch)
    for handle in handles:
        handle.remove()
    return [group for group in groups if seen & set(group)]


def _make_run(ctx: Context) -> None:
    from auto_round import AutoRound

    try:
        ctx.run = AutoRound(
            str(ctx.saved),
            scheme=ctx.scheme,
            group_size=GROUP,
            dataset=ctx.samples,
            nsamples=SAMPLES,
            seqlen=LENGTH,
            batch_size=BATCH,
            iters=ITERS,
            amp=False,
            device_map="cpu",
            show_progress=False,
            trust_remote_code=ctx.trust,
        )
    except PlanError as error:
        ctx.plan_error = error
    except CheckpointError as error:
        raise wrong_names(error) from error
    except Exception as error:
        words = "the compressor cannot be made"
        remedy = "if the message does not say what to do, run AutoRound on the model and report the traceback"
        raise Symptom(f"{where(error, ctx.models())[0]}{message(error)}", symptom=words, remedy=remedy) from error


def _no_blocks(ctx: Context, loose: list[list[str]]) -> Symptom:
    model = ctx.adapted.model
    cause = f"the tree has no list of blocks: {outline(model)}"
    if not loose and (lost := anatomy.unregistered(model)):
        return _plain_list(lost)
    if loose:
        kinds = ", ".join(type(model.get_submodule(group[0])).__name__ for group in loose)
        cause = f"modules that look like blocks are plain attributes: {'; '.join(map(', '.join, loose))} ({kinds})"
    with contextlib.suppress(Exception):
        loose = [called_blocks(ctx.adapted, [n for g in loose for n in g], contextlib.nullcontext)] if loose else []
    return Symptom(cause, "blocks", facts={"stacks": loose, "outline": outline(model)})


def _plain_list(names: list[str]) -> Symptom:
    cause = f"{listed(names)} holds modules in a plain Python list, where PyTorch neither saves nor loads them"
    remedy = "in the model's class, hold them in nn.ModuleList"
    return Symptom(cause, symptom="No quantizable layers found", remedy=remedy, facts={"unregistered": names})


def check_layers(ctx: Context) -> Finding:
    model = ctx.adapted.model
    unknown = anatomy.unknown_layers(model, ctx.blocks)
    routers = find_routers(model, ctx.blocks)
    unknown = {name: module for name, module in unknown.items() if name not in routers}
    ctx.unknown = list(unknown)
    reasons: dict[str, list[str]] = {}
    if ctx.run is not None:
        inside = {name: plan for name, plan in ctx.run.plan.layers.items() if plan.info.block is not None}
        done = sum(plan.is_quantized for plan in inside.values())
        for name, plan in inside.items():
            reasons.setdefault(plan.reason, []).append(name) if not plan.is_quantized else None
    else:
        inside = {n: m for b in ctx.blocks for n, m in model.get_submodule(b).named_modules(prefix=b)}
        inside = {name: module for name, module in inside.items() if is_supported_layer(module)}
        small = [name for name, module in inside.items() if any(size % PACK for size in module.weight.shape)]
        reasons |= {f"their shape is not a multiple of {PACK}": small} if small else {}
        done = len(inside) - len(small)
    for name, module in unknown.items():
        reasons.setdefault(f"the layer type {type(module).__name__} is not known", []).append(name)
    kept = {reason: patterns(names) for reason, names in reasons.items()}
    total = len(inside) + len(unknown)
    words = "; ".join(f"{len(reasons[reason])} kept, {reason} ({listed(names)})" for reason, names in kept.items())
    facts = {"quantized": done, "total": total, "kept": kept}
    classes = {type(m).__name__: [type(m).__module__, type(m).__name__] for m in unknown.values()}
    weight = sum(module.weight.numel() for module in unknown.values())
    if done == 0 or weight > (1 - MIN_COVERAGE) * max(1, anatomy.weight_in(model, ctx.blocks)):
        cause = words or "the blocks hold no layer that could be quantized"
        facts["unknown"] = list(classes.values())
        extension = "layers" if classes or ctx.run is not None else "unfusing"
        symptom = f"Quantized {done}/{total} layers"
        if extension == "unfusing":
            raise _fused_parameters(ctx, _missed(ctx, set())[0], symptom, facts)
        raise Symptom(cause, extension, symptom=symptom, facts=facts, classes=", ".join(classes) or "their type")
    detail = f"Quantized {done}/{total} layers" + (f": {words}" if words else "")
    return Finding("layers", detail=detail, facts=facts)


def _missed(ctx: Context, covered: set[str]) -> tuple[list[str], dict[str, int]]:
    """(parameters used as matrices that no layer covers, elements of every matrix of the blocks)."""
    model, blocks = ctx.adapted.model, ctx.blocks
    routers = find_routers(model, blocks)
    sizes = {n: p.numel() for n, p in block_matrices(model, blocks) if n.removesuffix(".weight") not in routers}
    missed = [name for name in sizes if name not in covered]
    ctx.adapted.set_blocks([name for stack in find_stacks(model) for name in stack] or blocks)
    with contextlib.suppress(Exception):  # whatever a forward over text alone may raise
        used = used_as_matrices(ctx.adapted, ctx.adapted.blocks, missed, contextlib.nullcontext)
        sizes = {name: size for name, size in sizes.items() if name in covered or name in used}
        missed = [name for name in missed if name in used]
    return missed, sizes


def check_coverage(ctx: Context) -> Finding:
    model = ctx.adapted.model
    inside = {n: m for b in ctx.blocks for n, m in model.get_submodule(b).named_modules(prefix=b)}
    layers = [name for name, module in inside.items() if is_supported_layer(module)]
    kept = ctx.run.plan.kept() if ctx.run is not None else {}
    covered = {f"{name}.weight" for name in layers if name not in kept}
    missed, sizes = _missed(ctx, covered)
    share = sum(size for name, size in sizes.items() if name in covered) / max(1, sum(sizes.values()))
    facts = {"share": round(share, 4), "missed": {n: list(model.get_parameter(n).shape) for n in missed}}
    if share >= MIN_COVERAGE:
        left = f"; the rest: {listed(patterns(missed))}" if missed else ""
        return Finding("coverage", detail=f"{share:.1%} of the blocks' weights are quantized{left}", facts=facts)
    raise _gap(ctx, share, missed, facts, kept)


def _gap(ctx: Context, share: float, missed: list[str], facts: dict[str, Any], kept: Mapping[str, Any]) -> Symptom:
    """What covers too little: shapes that no kernel reads, or parameters that are no layer's."""
    words = f"only {share:.0%} of the blocks' weights are quantized"
    raw = [name for name in missed if name.removesuffix(".weight") not in {*kept, *ctx.unknown}]
    if not raw:
        reasons = {plan.reason for name, plan in kept.items() if f"{name}.weight" in missed}
        remedy = "give the layers a scheme that fits with layer_config, or keep them on purpose with ignore_layers"
        return Symptom("; ".join(sorted(reasons)) or words, symptom=words, remedy=remedy, facts=facts)
    return _fused_parameters(ctx, raw, f"{words}: no layer covers fused parameters", facts)


def _fused_parameters(ctx: Context, names: list[str], symptom: str, facts: dict[str, Any]) -> Symptom:
    """Parameters that are used as matrices and belong to no layer, with what an unfuser needs to know of them."""
    model = ctx.adapted.model
    facts["fused"] = anatomy.fused_facts(model, names)
    shapes = {re.sub(r"\d+", "N", name): list(model.get_parameter(name).shape) for name in names}
    owners = ", ".join(f"{entry['class']}.forward{entry['forward']}" for entry in facts["fused"])
    found = listed(f"{name} {shape}" for name, shape in shapes.items())
    cause = f"{found}: matrices that are no layer's weight, in {owners}" if names else "no matrices in the blocks"
    classes = ", ".join(repr(entry["class"]) for entry in facts["fused"])
    return Symptom(cause, "unfusing", symptom=symptom, facts=facts, classes=classes)
