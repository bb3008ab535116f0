"""The check that replaced modules compute what the fused ones do, module by module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from auto_round.calibration.block_io import main_tensor
from auto_round.calibration.native import no_cache, relative
from auto_round.doctor import anatomy
from auto_round.doctor.context import Context, logits
from auto_round.doctor.finding import Finding, Symptom, message, where

SAME_MODULE = 1e-4  # relative difference of a replaced module's output, in float32


def check_fused(ctx: Context) -> Finding:
    replaced = ctx.adapted.replaced
    if not replaced:
        return Finding("fused modules", detail="none", facts={"replaced": {}})
    seen: dict[str, tuple] = {}
    handles = []
    for name in replaced:

        def note(module, args, kwargs, output, name=name):
            seen[name] = (args, kwargs, output)

        handles.append(ctx.model.get_submodule(name).register_forward_hook(note, with_kwargs=True))
    logits(ctx.model, ctx.batch)
    for handle in handles:
        handle.remove()
    errors = {name: _difference(ctx, name, *call) for name, call in seen.items()}
    kinds = {type(pair.original).__name__: type(pair.new).__name__ for pair in replaced.values()}
    facts = {"replaced": {n: type(p.original).__name__ for n, p in replaced.items()}, "errors": errors}
    worst = max(errors, key=errors.__getitem__, default=None)
    if worst is not None and not errors[worst] <= SAME_MODULE:
        own = type(replaced[worst].original).__name__
        facts["fused"] = [entry for entry in anatomy.fused_facts(ctx.model, _fused_names(replaced, worst)) if entry]
        cause = f"with layers of its own for each expert, {worst} ({own}) gives an output {errors[worst]:.2%} away"
        raise Symptom(cause, "unfusing", symptom="unfused ≠ fused", facts=facts, classes=repr(own))
    how = ", ".join(f"{old} → {new}" for old, new in kinds.items())
    compared = f"at most {max(errors.values()):.1e} apart" if errors else "none is called as a module: see replay"
    return Finding("fused modules", detail=f"{len(replaced)} taken apart ({how}), {compared}", facts=facts)


def _fused_names(replaced: Mapping[str, Any], name: str) -> list[str]:
    return sorted({f"{name}.{part.parameter}" for part in replaced[name].origin.values()})


def _difference(ctx: Context, name: str, args: tuple, kwargs: dict, output: Any) -> float:
    pair = ctx.adapted.replaced[name]
    try:
        with torch.no_grad(), no_cache(ctx.adapted.model):
            again = pair.new(*args, **kwargs)
        return relative(main_tensor(again)[1], main_tensor(output)[1])
    except Exception as error:
        own = type(pair.original).__name__
        cause = f"taken apart, {name} ({own}) fails: {where(error, ctx.models())[0]}{message(error)}"
        facts = {"fused": anatomy.fused_facts(ctx.model, _fused_names(ctx.adapted.replaced, name))}
        raise Symptom(cause, "unfusing", facts=facts, classes=repr(own)) from error
