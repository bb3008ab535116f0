"""What the ranks of one run do together: open the work folder, keep and recover blocks, and see all samples.

The main rank alone decides what of an earlier run is good and alone writes blocks that all have worked on; the others
read them back, so that all go on from the same bytes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from auto_round.compressors.chain import LayerInputs
from auto_round.plan import LayerPlan
from auto_round.ranks import Ranks, RanksError
from auto_round.store import BlockResult, Store, fingerprint


def open_store(root: Path, facts: Mapping[str, Any], ranks: Ranks) -> Store:
    """The run's work folder, which the main rank makes and holds.

    Raises:
        RanksError: ranks differ in what they would quantize, or do not see the folder.
    """
    ranks.barrier()  # one may have had to download the model, which takes longer than an exchange may
    prints = ranks.everyone(fingerprint(facts).encode())
    other = next((rank for rank, one in enumerate(prints) if one != prints[0]), None)
    if other is not None:
        raise RanksError(
            f"rank {other} has other settings, calibration data, weights or versions than rank 0: give all ranks the "
            "same command, model and packages"
        )
    if ranks.main:
        store = Store(root, facts)
        ranks.barrier()
        return store
    ranks.barrier()
    store = Store(root, facts, main=False)
    if not store.folder.is_dir():
        raise RanksError(
            f"rank {ranks.rank} does not see {store.folder}, which rank 0 has made: give an output folder that all "
            "machines share"
        )
    return store


def temporary_root(ranks: Ranks) -> tuple[Path, tempfile.TemporaryDirectory | None]:
    """A new folder, the same for all ranks; the main rank has the object that removes it."""
    made = tempfile.TemporaryDirectory(prefix="auto_round_") if ranks.main else None
    return Path(ranks.everyone(made.name.encode() if made else b"")[0].decode()), made


def recover(store: Store, block: str, layers: Mapping[str, LayerPlan], ranks: Ranks) -> BlockResult | None:
    """A block of an earlier run; None on all ranks if it has to be done (again)."""
    found = store.recover(block, layers) if ranks.main else None
    (there,) = ranks.sum(found is not None)
    return store.load(block, layers) if there and not ranks.main else found


def keep(store: Store, block: str, result: BlockResult, layers: Mapping[str, LayerPlan], ranks: Ranks) -> BlockResult:
    """Store a block that all ranks have worked on; what they go on with."""
    if ranks.main:
        store.save(block, result)
    ranks.barrier()
    return result if ranks.main else store.load(block, layers)


def of_all_samples(
    seen: Mapping[str, LayerInputs], layers: Mapping[str, LayerPlan], ranks: Ranks, device: torch.device
) -> dict[str, LayerInputs]:
    """What entered each layer over the samples of all ranks, of what this one saw of its own on `device`; float32."""
    totals = torch.tensor([seen[name].tokens if name in seen else 0 for name in layers], dtype=torch.int64)
    widths = torch.tensor([len(seen[name].mean_square) if name in seen else 0 for name in layers], dtype=torch.int64)
    ranks.sum_(totals)
    ranks.max_(widths)
    found: dict[str, LayerInputs] = {}
    for name, total, width in zip(layers, totals.tolist(), widths.tolist(), strict=True):
        if name in seen:
            own = seen[name]
            found[name] = LayerInputs(own.mean_square * own.tokens, total, own.largest.clone())
        elif total:
            zeros = torch.zeros(width, dtype=torch.float64, device=device)
            found[name] = LayerInputs(zeros, total, torch.zeros(1, device=device))
    ranks.sum_(*(one.mean_square for one in found.values()))
    ranks.max_(*(one.largest for one in found.values()))
    return {name: replace(one, mean_square=(one.mean_square / one.tokens).float()) for name, one in found.items()}


def all_notes(
    blocks: list[dict[str, Any]], warnings: list[str], order: Sequence[str], ranks: Ranks
) -> tuple[list[dict[str, Any]], list[str]]:
    """(log of blocks in the order of these names, warnings) of all ranks.

    What another rank warns of and the main rank does not says whose it is.
    """
    if ranks.world == 1:
        return blocks, warnings
    log: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for rank, text in enumerate(ranks.everyone(json.dumps([blocks, warnings]).encode())):
        entries, own = json.loads(text)
        log = {**{entry["name"]: entry for entry in entries}, **log}
        notes += [f"rank {rank}: {note}" if rank else note for note in own if note not in notes]
    return [log[name] for name in order if name in log], notes
