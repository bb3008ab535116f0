"""The checks of a run: replay, calibration, quantization, saving, reloading, outputs and names."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from auto_round.calibration.block_io import own_leaf
from auto_round.calibration.forwards import BlockCall, PausedForward, ReplayError, pausing
from auto_round.calibration.native import no_cache, relative
from auto_round.doctor import anatomy
from auto_round.doctor.context import Context, logits
from auto_round.doctor.finding import WARNING, Finding, Symptom, listed, message, patterns, where, wrong_names
from auto_round.inference.load import load_model
from auto_round.modeling.checkpoint import Checkpoint, CheckpointError
from auto_round.utils.common import is_transposed

SLOPE, SLACK = 2.5, 0.02  # of the logits' error, against that of rounding the same weights to nearest
_SHAPES = re.compile(r"size of tensor|cannot be multiplied|shape|Sizes of tensors|Expected size|expand|mat1|broadcast")


# ---- replay -------------------------------------------------------------------------------------------------------


def check_replay(ctx: Context) -> Finding:
    try:
        ctx.native = ctx.run.observe_original()
    except Exception as error:
        raise _explain(ctx, error, "replay") from error
    native = ctx.native
    names: dict[Any, dict[int, str]] = {}
    with contextlib.suppress(Exception):  # names are for reading; the proof is made
        names = {call.place: _tensor_names(ctx, call) for call, _ in _calls(ctx)}
    joints = {
        place: {
            "shared": [name for position, name in names.get(place, {}).items() if _dim(joint, position) is None],
            "per sample": [
                name for position, name in names.get(place, {}).items() if _dim(joint, position) is not None
            ],
            "joins": joint.joins,
            "reason": joint.reason,
        }
        for place, joint in native.joints.items()
    }
    facts = {
        "order": [block for block, _ in native.places],
        "arguments": {f"{block}#{turn}" if turn else block: joint for (block, turn), joint in joints.items()},
        "replacement_error": native.replacement_error,
    }
    return _replay_finding(ctx, facts)


def _replay_finding(ctx: Context, facts: dict[str, Any]) -> Finding:
    arguments = facts["arguments"].values()
    calls = len(facts["order"])
    detail = f"{len(ctx.native.blocks)} blocks" + (f" in {calls} calls" if calls > len(ctx.native.blocks) else "")
    for kind in ("per sample", "shared"):
        names = dict.fromkeys(name for joint in arguments for name in joint[kind])
        detail += f"; {kind}: {', '.join(names) or 'none'}"
    alone = {joint["reason"]: block for block, joint in facts["arguments"].items() if not joint["joins"]}
    detail += "; samples can be joined" if not alone else ""
    finding = Finding("replay = model", detail=detail, facts=facts)
    rows = next(iter(ctx.native.batch.values())).shape[0] > 1
    if alone and rows:
        reason, block = next(iter(alone.items()))
        finding.detail += f"; samples pass one by one at {len(alone)} blocks ({block}: {reason})"
        facts["alone"] = alone
    missed = [block for block in ctx.blocks if block not in ctx.native.blocks]
    if missed:
        finding.status, finding.symptom = WARNING, "blocks that the text does not reach"
        finding.cause = f"{listed(missed)}: they are rounded to nearest instead of tuned"
        finding.remedy = "give samples that reach them (images, audio), or leave them out with to_quant_block_names"
    return finding


def _dim(joint: Any, position: int) -> int | None:
    return joint.arguments[position] if position < len(joint.arguments) else None


def _tensor_names(ctx: Context, call: BlockCall) -> dict[int, str]:
    """Position among a call's leaves → name, of its tensors; what is passed by place has the name of its parameter."""
    forward = type(ctx.adapted.model.get_submodule(call.block)).forward
    own = [p.name for p in inspect.signature(forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD][1:]
    found = {}
    for position, leaf in enumerate(call.leaves):
        if isinstance(leaf, torch.Tensor):
            name, bracket, rest = call.argument_name(position).partition("[")
            known = name.isdigit() and int(name) < len(own)
            found[position] = (own[int(name)] if known else name) + bracket + rest
    return found


def _calls(ctx: Context, probe: bool = False) -> Iterator[tuple[BlockCall, list[str]]]:
    """Calls of the blocks in a forward of the batch; with `probe`, and what changed in each block by its call."""
    model = ctx.adapted.model
    with pausing(model, ctx.run.streamed.blocks), no_cache(model):
        forward = PausedForward(model, ctx.batch, contextlib.nullcontext)
        try:
            call = forward.start()
            while call is not None:
                module = model.get_submodule(call.block)
                args, kwargs = torch.utils._pytree.tree_map(lambda leaf: own_leaf(leaf, True), (call.args, call.kwargs))
                before = anatomy.state_of(module, call.block) if probe else {}
                with torch.no_grad():
                    output = module(*call.args, **call.kwargs)
                    if probe:  # what the first call prepares lazily is no state; what the second changes is
                        middle = anatomy.state_of(module, call.block)
                        module(*args, **kwargs)
                changes = anatomy.changed(middle, anatomy.state_of(module, call.block)) if probe else []
                changes += [name for name in anatomy.changed(before, middle) if name not in changes] if probe else []
                yield call, changes
                call = forward.resume(output)
        finally:
            forward.close()


# ---- what an exception means --------------------------------------------------------------------------------------


def _explain(ctx: Context, error: Exception, stage: str) -> Symptom:
    """The extension point that an error in calibration or tuning points to."""
    if isinstance(error, CheckpointError):
        return wrong_names(error)
    place, module = where(error, ctx.models())
    cause = f"{place if not isinstance(error, ReplayError) else ''}{message(error)}"
    replaced = {type(pair.new) for pair in ctx.run.streamed.replaced.values()}
    if "unfuser" in str(error) or (module is not None and type(module) in replaced):
        pairs = ctx.adapted.replaced
        own = sorted({type(pair.original).__name__ for pair in pairs.values()})
        names = [f"{name}.{part.parameter}" for name, pair in pairs.items() for part in pair.origin.values()]
        facts = {"fused": anatomy.fused_facts(ctx.model, dict.fromkeys(names))}
        return Symptom(cause, "unfusing", facts=facts, classes=", ".join(map(repr, own)))
    missing = isinstance(error, (KeyError, IndexError)) or (isinstance(error, TypeError) and "argument" in str(error))
    joined = isinstance(error, RuntimeError) and not isinstance(error, ReplayError) and _SHAPES.search(str(error))
    if stage != "replay" and (missing or joined):
        keys = _suspects(ctx)
        cause += f"; arguments that follow the batch: {', '.join(keys)}" if keys else ""
        return Symptom(cause, "cache", facts={"keys": keys}, keys=", ".join(map(repr, keys)) or "…")
    facts = _forward_facts(ctx)
    if facts["state"]:
        cause += f"; calls change {listed(f'{name} of {kind}' for kind, own in facts['state'].items() for name in own)}"
    return Symptom(cause, "forward", facts=facts)


def _forward_facts(ctx: Context) -> dict[str, Any]:
    """What a custom forward needs to know: parameters, and by class the attributes that calls of blocks change."""
    state: dict[str, list[str]] = {}
    with contextlib.suppress(Exception):
        for _, changes in _calls(ctx, probe=True):
            for name in changes:
                owner, _, leaf = name.rpartition(".")
                kind = type(ctx.adapted.model.get_submodule(owner)).__name__
                state[kind] = list(dict.fromkeys([*state.get(kind, []), leaf]))
    return {"forward": anatomy.forward_parameters(ctx.model), "state": state}


def _suspects(ctx: Context) -> list[str]:
    """Arguments beside the hidden state that are cut and joined with the batch."""
    found: dict[str, None] = {}
    with contextlib.suppress(Exception):
        for call, _ in _calls(ctx):
            joint = ctx.native.joints.get(call.place)
            if joint is None:
                continue
            names = [name for place, name in _tensor_names(ctx, call).items() if _dim(joint, place) is not None]
            found |= dict.fromkeys(name.split("[")[0] for name in names[1:])
    return list(found)


# ---- calibration and tuning ---------------------------------------------------------------------------------------


def check_calib(ctx: Context) -> Finding:
    try:
        ctx.run.calib()
    except Exception as error:
        raise _explain(ctx, error, "calib") from error
    ctx.calibrated = True
    return Finding("calib()", detail=f"{len(ctx.run.samples)} samples wait at the first block")


def check_quantize(ctx: Context) -> Finding:
    try:
        ctx.run.quantize_blocks()
    except Exception as error:
        raise _explain(ctx, error, "quantize") from error
    log = ctx.run.block_log
    losses = {entry["name"]: (entry["start_loss"], entry["final_loss"]) for entry in log}
    tuned = {name: pair for name, pair in losses.items() if pair[0] is not None}
    bad = [name for name, (start, end) in tuned.items() if not (math.isfinite(start) and math.isfinite(end))]
    if bad:
        start, end = tuned[bad[0]]
        cause = f"the loss of {listed(bad)} is not a number (from {start} to {end})"
        facts = _forward_facts(ctx)
        raise Symptom(cause, "forward", symptom="diverging calibration", facts=facts)
    ctx.store = ctx.run.store
    idle = {entry["name"]: entry["note"] for entry in log if entry["note"]}
    detail = f"{sum(entry['layers'] for entry in log)} layers of {len(log)} blocks, {len(tuned)} of them tuned"
    detail += f"; {next(iter(idle.values()))}" if idle else ""
    return Finding("_quantize_blocks()", detail=detail, facts={"losses": losses, "notes": idle})


# ---- the result ---------------------------------------------------------------------------------------------------


def check_save(ctx: Context) -> Finding:
    final = ctx.work / "quantized"
    try:
        ctx.run.save_quantized(final)
        ctx.out = final
    except Exception as error:
        partial = final.with_name(final.name + ".partial")
        if not ("loads in Transformers" in str(error) or _reload_fails(partial)):
            raise _not_saved(ctx, error) from error
        ctx.out, ctx.save_error = partial, error  # written whole: it is the next check's matter
        return Finding("save", detail="written; see the next line")
    done, total = ctx.run.report["quantized_layers"]
    checks = ", ".join(check["name"] for check in ctx.run.report["checks"])
    return Finding("save", detail=f"{done}/{total} layers packed; {checks}", facts={"checks": ctx.run.report["checks"]})


def _reload_fails(folder: Any) -> bool:
    if not (folder / "config.json").exists() or not list(folder.glob("*.safetensors")):
        return False
    try:
        load_model(folder)
    except Exception:
        return True
    return False


def _not_saved(ctx: Context, error: Exception) -> Symptom:
    words = "the quantized model cannot be written"
    if ctx.run.streamed.replaced and ("source tensor" in str(error) or "parts" in str(error)):
        own = sorted({type(pair.original).__name__ for pair in ctx.run.streamed.replaced.values()})
        return Symptom(message(error), "unfusing", symptom=words, classes=", ".join(map(repr, own)))
    remedy = "the writer and the model's structure disagree: report it with this line"
    return Symptom(f"{where(error, ctx.models())[0]}{message(error)}", symptom=words, remedy=remedy)


def check_reload(ctx: Context) -> Finding:
    words, remedy = "the artifact does not load in Transformers", "report it: the reader and the writer disagree"
    try:
        loaded = load_model(ctx.out, ctx.trust)
    except Exception as error:
        cause = f"{where(error)[0]}{message(error)}"
        raise Symptom(cause, symptom=words, remedy=remedy) from error
    if ctx.save_error is not None:
        raise Symptom(message(ctx.save_error), "forward", symptom="wrong outputs after reloading")
    meta = [name for name, p in (*loaded.named_parameters(), *loaded.named_buffers()) if p.device.type == "meta"]
    if meta:
        raise Symptom(f"{listed(patterns(meta))} have no tensor in the files", symptom=words, remedy=remedy)
    ctx.loaded = loaded
    kinds: dict[str, int] = {}
    for name in ctx.run.plan.quantized():
        with contextlib.suppress(AttributeError):
            kind = type(loaded.get_submodule(name)).__name__
            kinds[kind] = kinds.get(kind, 0) + 1
    layers = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return Finding("reload", detail=f"{type(loaded).__name__} with {layers}", facts={"layers": kinds})


def check_logits(ctx: Context) -> Finding:
    error = relative(logits(ctx.loaded, ctx.batch), ctx.logits)
    bound = relative(logits(rounded(ctx), ctx.batch), ctx.logits)
    limit = SLOPE * bound + SLACK
    facts = {"error": round(error, 5), "round_to_nearest": round(bound, 5), "limit": round(limit, 5)}
    detail = f"error {error:.3f}; rounding the same weights to nearest has {bound:.3f}, the limit is {limit:.3f}"
    if not error <= limit:
        facts |= _forward_facts(ctx)
        raise Symptom(detail, "forward", symptom="wrong outputs", facts=facts)
    return Finding("logits", detail=detail, facts=facts)


@torch.no_grad()
def rounded(ctx: Context) -> nn.Module:
    """A copy of the clone whose planned layers are rounded to nearest, the largest of each group being -2^(bits-1)."""
    model = ctx.adapted.model
    held = model.__dict__.pop("forward", None)
    other = copy.deepcopy(model)
    if held is not None:
        model.forward = held
        other.forward = type(held)(held.func, other, *held.args[1:], **_rebound(held.keywords, other))
    for name, plan in ctx.run.plan.quantized().items():
        layer = other.get_submodule(name)
        weight = layer.weight.t() if is_transposed(layer) else layer.weight
        size = plan.scheme.group_size if plan.scheme.group_size > 0 else weight.shape[-1]
        groups = weight.reshape(-1, size if weight.shape[-1] % size == 0 else weight.shape[-1])
        top = 2 ** (plan.scheme.bits - 1)
        largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
        scale = torch.where(largest == 0, 1.0, largest / -top)
        weight.copy_(((groups / scale).round().clamp(-top, top - 1) * scale).reshape(weight.shape))
    return other


def _rebound(keywords: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The arguments of a custom forward, with the model's own forward being this model's."""
    return {key: model.forward if key == "original" else value for key, value in keywords.items()}


def check_names(ctx: Context) -> Finding:
    """Each tensor of the source keeps its name, byte for byte or as the packed layer of that name."""
    source, stored = Checkpoint(ctx.saved), Checkpoint(ctx.out)
    have = set(stored.names())
    layers = {name.removesuffix(".qweight") for name in have if name.endswith(".qweight")}
    groups = list(ctx.run.streamed.names.groups.values())
    written = {name for group in groups for name in group.written.values()}
    regrouped = {name for group in groups for name in group.sources}
    given = set(source.names())
    strange = [layer for layer in layers if f"{layer}.weight" not in given | written]
    lost = [n for n in given if n not in have | regrouped and n.removesuffix(".weight") not in layers]
    twice = [name for name in given & have if name.removesuffix(".weight") in layers and name.endswith(".weight")]
    words, remedy = "stored names are not the checkpoint's", "mend the names in auto_round/modeling/name_map.py"
    for names, what in ((strange, "no such source tensor"), (lost, "lost"), (twice, "stored twice")):
        if names:
            raise Symptom(f"{listed(patterns(sorted(names)))}: {what}", symptom=words, remedy=remedy)
    detail = f"{len(given)} source tensors: {len(layers)} packed layers, {len(given & have)} carried over"
    parts = sum(len(group.written) for group in groups if not set(group.sources) & have)
    detail += f", {parts} parts of fused ones" if parts else ""
    return Finding("stored names", detail=detail, facts={"layers": patterns(sorted(layers))})
