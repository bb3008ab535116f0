"""Quantized blocks on disk: what tuning leaves and exporting reads, and the unit of restart.

A work folder holds `run.json` (settings and plan) and one safetensors file per block, written under a temporary name,
synced, then renamed, so that a file that is there is complete. Codes are kept bit-packed. The folder's name carries a
fingerprint of everything that the codes depend on: a run with other settings uses another folder and loses nothing.
Work folders for the same output lie side by side under one lock, since their runs would write the same files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from auto_round.modeling.reading import read_json, reading
from auto_round.plan import LayerPlan
from auto_round.schemes import TensorSpec
from auto_round.utils.files import InUseError, Lock, make_folder, sync

LEARNED = "scales"  # names the file of scales that are trained after the last block
BESIDE = "beside:"  # begins the names of tensors that belong to no layer


@dataclass
class TuningWork:
    """What tuning a block took. flops: of the matrix products of one step; seconds: of the steps after the first."""

    steps: int = 0
    flops: int = 0
    seconds: float = 0.0


@dataclass
class BlockResult:
    """A block's codes and how they were found.

    losses: (iteration, mean square error of the output) of the tuning.
    beside: tensors of no layer that are stored with the block (scales of attention), by parameter name.
    work: what the tuning took, where there was one; it is not stored.
    """

    tensors: Mapping[str, QuantizedTensor]
    losses: list[tuple[int, float]] = field(default_factory=list)
    start_loss: float | None = None
    final_loss: float | None = None
    note: str = ""
    beside: dict[str, torch.Tensor] = field(default_factory=dict)
    work: TuningWork | None = None


_GOES_ON = "finished blocks are kept, and the same command goes on after them"
_AGAIN = "start the run with the same command again, which writes it anew and keeps the finished blocks"


class StoreError(RuntimeError):
    """A work folder that cannot be used; the message says why and what to do."""


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Short hash of everything that the codes depend on; where the source lies is recorded, but does not matter."""
    facts = {key: value for key, value in facts.items() if key != "source_dir"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


class Store:
    """The work folder of one run.

    main: False in a process that works beside the one that holds the folder.

    Raises:
        StoreError: another process is using the folder or one beside it, or a block file is damaged.
    """

    def __init__(self, root: Path, facts: Mapping[str, Any], main: bool = True):
        self.facts = dict(facts)
        self.fingerprint = fingerprint(facts)
        root = Path(root).absolute()  # the program may change its directory during the run
        self.folder = root / self.fingerprint
        self._lock: Lock | None = None
        self._sound: int | None = None  # when the trained scales were written whose hash was found right
        if main:
            self._hold(root)

    def _hold(self, root: Path) -> None:
        make_folder(self.folder)
        try:
            self._lock = Lock(root / "lock", str(root))
        except InUseError as error:
            raise StoreError(str(error)) from error
        try:
            self._remove_leftovers()
            write_json(self.folder / "run.json", self.facts)
            sync(self.folder)
        except BaseException:
            self._lock.close()
            raise

    def _remove_leftovers(self) -> None:
        """What a killed run was writing."""
        for kind in ("*.tmp", "*.partial", "*.activations"):
            for file in self.folder.glob(kind):
                file.unlink()

    @classmethod
    def open_existing(cls, folder: Path) -> Store:
        """A work folder of an earlier run (for exporting again).

        Raises:
            StoreError: the folder is no work folder, or its run.json is damaged.
        """
        folder = Path(folder).absolute()
        file = folder / "run.json"
        if not file.exists():
            raise StoreError(f"{folder} is no work folder: it has no run.json")
        try:
            facts = read_json(file)
            known = fingerprint(facts)
        except (ValueError, AttributeError) as error:
            raise StoreError(f"{file} is damaged ({error}): {_AGAIN}") from error
        if known != folder.name:
            raise StoreError(f"{file} does not belong to its folder {folder.name}, or was changed: {_AGAIN}")
        return cls(folder.parent, facts)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def scratch(self, name: str) -> Path:
        """A file name in the folder for data that the run itself removes."""
        return self.folder / name

    def path(self, block: str) -> Path:
        return self.folder / f"{hashlib.sha256(block.encode()).hexdigest()[:8]}-{_safe(block)}.safetensors"

    def has(self, block: str) -> bool:
        return self.path(block).exists()

    def save(self, block: str, result: BlockResult) -> None:
        """Write a block's codes; once this returns they survive anything but the loss of the disk.

        Raises:
            OSError: the disk is full, or broken; nothing of the block is left.
        """
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
        self._write(self.path(block), tensors, metadata)

    def _write(self, file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        """Put a whole file in its place, or nothing."""
        temporary = file.with_suffix(".tmp")
        try:
            save_file(tensors, temporary, metadata)
            sync(temporary)
            temporary.replace(file)
        except SafetensorError as error:  # what the library makes of a full disk
            raise OSError(f"{temporary} could not be written ({error}): make room; {_GOES_ON}") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        sync(self.folder)

    def load(self, block: str, layers: Mapping[str, LayerPlan], learned: bool = True) -> BlockResult:
        """Read a block's codes back: packed, and unpacked layer by layer as they are looked up.

        learned: with the scales that were trained after the last block, if there are any.

        Raises:
            StoreError: the file is damaged or lacks a layer.
        """
        try:
            return self._read(block, layers, self._learned(layers) if learned else {})
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:  # a header that was changed
            raise StoreError(f"{self.path(block)} is damaged ({error!r}): delete it and run again") from error

    def _read(self, block: str, layers: Mapping[str, LayerPlan], scales: Mapping[str, torch.Tensor]) -> BlockResult:
        try:
            with safe_open(self.path(block), framework="pt") as handle:
                metadata = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            problem = _problem(block, metadata, tensors)
            result = BlockResult({}, **json.loads(metadata.get("result", "{}")))
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            problem = str(error)
        if problem is not None:
            raise StoreError(f"{self.path(block)} is damaged ({problem}): delete it and run again")
        for name, plan in layers.items():
            if f"{name}.codes" not in tensors:
                raise StoreError(f"{self.path(block)} has no codes for {name}: delete it and run again")
            if name in scales:
                tensors[f"{name}.scale"] = scales[name]
            result.tensors[name] = functools.partial(_unpacked, tensors, name, plan.scheme.weight)
        result.tensors = _OneByOne(result.tensors)
        result.beside = {key.removeprefix(BESIDE): value for key, value in tensors.items() if key.startswith(BESIDE)}
        return result

    def beside(self, block: str) -> dict[str, torch.Tensor]:
        """A block's tensors of no layer alone; none if the block is not there."""
        if not self.has(block):
            return {}
        damaged = f"delete {self.path(block)} and run again"
        with reading(self.path(block), damaged), safe_open(self.path(block), framework="pt") as handle:
            names = [name for name in handle.keys() if name.startswith(BESIDE)]  # noqa: SIM118
            return {name.removeprefix(BESIDE): handle.get_tensor(name) for name in names}

    def recover(self, block: str, layers: Mapping[str, LayerPlan]) -> BlockResult | None:
        """A block of an earlier run, or None if it has to be done (again)."""
        if not self.has(block):
            return None
        try:
            return self.load(block, layers, learned=False)
        except StoreError as error:
            logger.warning("%s; that block is done again", error)
            return None

    # ---- what is learned after the last block --------------------------------------------------------------------

    def digest(self, blocks: Sequence[str]) -> str:
        """A hash of what lies in the files of these blocks."""
        digest = hashlib.sha256()
        for block in blocks:
            with safe_open(self.path(block), framework="pt") as handle:
                digest.update((handle.metadata() or {}).get("sha256", "").encode())
        return digest.hexdigest()

    def save_extra(self, name: str, key: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Write tensors that belong to several blocks. key: what they depend on; facts: plain values to keep."""
        tensors = {part: tensor.contiguous().cpu() for part, tensor in tensors.items()}
        metadata = {"block": name, "key": key, "sha256": _digest(tensors), "facts": json.dumps(facts)}
        self._write(self._extra_path(name), tensors, metadata)

    def extra(self, name: str, key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """(tensors, facts) as they were saved for this key; None if there are none that can be used."""
        file = self._extra_path(name)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as handle:
                metadata = handle.metadata() or {}
                tensors = {part: handle.get_tensor(part) for part in handle.keys()}  # noqa: SIM118
            if metadata.get("key") == key and _problem(name, metadata, tensors) is None:
                return tensors, json.loads(metadata["facts"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            logger.warning("%s is damaged (%s); what it held is learned again", file, error)
        return None

    def drop_extra(self, name: str) -> None:
        self._extra_path(name).unlink(missing_ok=True)

    def _extra_path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _learned(self, layers: Mapping[str, LayerPlan]) -> dict[str, torch.Tensor]:
        """Scales that were trained after the last block; the file's hash is compared when it is first read.

        Raises:
            StoreError: the file is damaged.
        """
        file = self._extra_path(LEARNED)
        if not file.exists():
            return {}
        try:
            with safe_open(file, framework="pt") as handle:
                known, written = set(handle.keys()), file.stat().st_mtime_ns
                if self._sound != written:
                    problem = _problem(
                        LEARNED, handle.metadata() or {}, {name: handle.get_tensor(name) for name in known}
                    )
                    if problem is not None:
                        raise StoreError(f"{file} is damaged ({problem}): {_AGAIN}")
                    self._sound = written
                return {name: handle.get_tensor(name) for name in layers if name in known}
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{file} is damaged ({error}): {_AGAIN}") from error


def _problem(block: str, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Why a file is not what was saved of a block; None if it is."""
    if metadata.get("block") != block:
        return f"it holds {metadata.get('block')!r}, not {block!r}"
    return None if metadata.get("sha256") == _digest(tensors) else "its hash differs"


class _OneByOne(Mapping[str, QuantizedTensor]):
    """Layers whose tensors are made anew each time: unpacked codes of a whole block would be twice the file."""

    def __init__(self, makers: Mapping[str, Callable[[], QuantizedTensor]]):
        self._makers = makers

    def __getitem__(self, name: str) -> QuantizedTensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _unpacked(tensors: Mapping[str, torch.Tensor], name: str, spec: TensorSpec) -> QuantizedTensor:
    extra = f"{name}.extra."
    return QuantizedTensor(
        unpack_bits(tensors[f"{name}.codes"], spec.bits, dim=1),
        tensors[f"{name}.scale"],
        tensors.get(f"{name}.zero_point"),
        spec,
        {key.removeprefix(extra): value for key, value in tensors.items() if key.startswith(extra)},
        tensors.get(f"{name}.input_scale"),
    )


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:80]
