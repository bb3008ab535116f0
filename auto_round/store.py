"""Quantized blocks on disk: what tuning leaves and exporting reads, and the unit of restart.

A work folder holds `run.json` (settings and plan) and one safetensors file per block, written under a temporary name,
synced, then renamed, so that a file that is there is complete. Codes are kept bit-packed. The folder's name carries a
fingerprint of everything that the codes depend on: a run with other settings uses another folder and loses nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from auto_round.data_type.base import QuantizedTensor
from auto_round.formats.packing import pack_bits, unpack_bits
from auto_round.formats.writer import write_json
from auto_round.logger import logger
from auto_round.plan import LayerPlan

BESIDE = "beside:"  # begins the names of tensors that belong to no layer


@dataclass
class BlockResult:
    """A block's codes and how they were found.

    losses: (iteration, mean square error of the output) of the tuning.
    beside: tensors of no layer that are stored with the block (scales of attention), by parameter name.
    """

    tensors: dict[str, QuantizedTensor]
    losses: list[tuple[int, float]] = field(default_factory=list)
    start_loss: float | None = None
    final_loss: float | None = None
    note: str = ""
    beside: dict[str, torch.Tensor] = field(default_factory=dict)


class StoreError(RuntimeError):
    """A work folder that cannot be used; the message says why and what to do."""


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Short hash of everything that the codes depend on; where the source lies is recorded, but does not matter."""
    facts = {key: value for key, value in facts.items() if key != "source_dir"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


class Store:
    """The work folder of one run.

    Raises:
        StoreError: another process is using the folder, or a block file is damaged.
    """

    def __init__(self, root: Path, facts: Mapping[str, Any]):
        self.facts = dict(facts)
        self.fingerprint = fingerprint(facts)
        self.folder = Path(root) / self.fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "w")  # noqa: SIM115 - held for the life of the run
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(
                f"{self.folder} is in use by another run: wait for it, or choose another output"
            ) from error
        write_json(self.folder / "run.json", self.facts)

    @classmethod
    def open_existing(cls, folder: Path) -> Store:
        """A work folder of an earlier run (for exporting again).

        Raises:
            StoreError: the folder is no work folder.
        """
        file = Path(folder) / "run.json"
        if not file.exists():
            raise StoreError(f"{folder} is no work folder: it has no run.json")
        return cls(Path(folder).parent, json.loads(file.read_text(encoding="utf-8")))

    def close(self) -> None:
        self._lock.close()

    def scratch(self, name: str) -> Path:
        """A file name in the folder for data that the run itself removes."""
        return self.folder / name

    def path(self, block: str) -> Path:
        return self.folder / f"{hashlib.sha256(block.encode()).hexdigest()[:8]}-{_safe(block)}.safetensors"

    def has(self, block: str) -> bool:
        return self.path(block).exists()

    def save(self, block: str, result: BlockResult) -> None:
        """Write a block's codes; once this returns they survive anything but the loss of the disk."""
        tensors = {}
        for name, tensor in result.tensors.items():
            tensors[f"{name}.codes"] = pack_bits(tensor.codes, tensor.spec.bits, dim=1)
            parts = {"scale": tensor.scale, "zero_point": tensor.zero_point, "input_scale": tensor.input_scale}
            parts |= {f"extra.{key}": value for key, value in tensor.extra.items()}
            tensors |= {f"{name}.{key}": value.contiguous() for key, value in parts.items() if value is not None}
        tensors |= {f"{BESIDE}{name}": tensor for name, tensor in result.beside.items()}
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        facts = {k: getattr(result, k) for k in ("losses", "start_loss", "final_loss", "note")}
        metadata = {"block": block, "sha256": _digest(tensors), "result": json.dumps(facts)}
        temporary = self.path(block).with_suffix(".tmp")
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(self.path(block))
        _sync_folder(self.folder)

    def load(self, block: str, layers: Mapping[str, LayerPlan]) -> BlockResult:
        """Read a block's codes back.

        Raises:
            StoreError: the file is damaged or lacks a layer.
        """
        try:
            with safe_open(self.path(block), framework="pt") as handle:
                metadata = handle.metadata()
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{self.path(block)} is damaged ({error}): delete it and run again") from error
        if _digest(tensors) != metadata["sha256"]:
            raise StoreError(f"{self.path(block)} is damaged (its hash differs): delete it and run again")
        result = BlockResult({}, **json.loads(metadata["result"]))
        for name, plan in layers.items():
            if f"{name}.codes" not in tensors:
                raise StoreError(f"{self.path(block)} has no codes for {name}: delete it and run again")
            spec, extra = plan.scheme.weight, f"{name}.extra."
            result.tensors[name] = QuantizedTensor(
                unpack_bits(tensors[f"{name}.codes"], spec.bits, dim=1),
                tensors[f"{name}.scale"],
                tensors.get(f"{name}.zero_point"),
                spec,
                {key.removeprefix(extra): value for key, value in tensors.items() if key.startswith(extra)},
                tensors.get(f"{name}.input_scale"),
            )
        result.beside = {key.removeprefix(BESIDE): value for key, value in tensors.items() if key.startswith(BESIDE)}
        return result

    def beside(self, block: str) -> dict[str, torch.Tensor]:
        """A block's tensors of no layer alone; none if the block is not there."""
        if not self.has(block):
            return {}
        with safe_open(self.path(block), framework="pt") as handle:
            names = [name for name in handle.keys() if name.startswith(BESIDE)]  # noqa: SIM118
            return {name.removeprefix(BESIDE): handle.get_tensor(name) for name in names}

    def recover(self, block: str, layers: Mapping[str, LayerPlan]) -> BlockResult | None:
        """A block of an earlier run, or None if it has to be done (again)."""
        if not self.has(block):
            return None
        try:
            return self.load(block, layers)
        except StoreError as error:
            logger.warning("%s; that block is done again", error)
            return None


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:80]


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
