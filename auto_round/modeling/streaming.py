"""A model whose weights are present only while they are needed.

The model is built without weights (parameters on the meta device, computed buffers real). A block's weights are read
from the checkpoint when its turn comes and given back when it is done. A model object of the user's own is another
source of the same tensors: its weights are there already, so loading and releasing do nothing.

Names: `<module>.weight` is the model's name, the checkpoint may call it otherwise; the translation is Transformers'
own (renamings and converters of its loader), so every checkpoint that Transformers loads streams the same way.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from auto_round.modeling.checkpoint import Checkpoint, CheckpointError
from auto_round.utils.device import trim_memory


class TensorShape(NamedTuple):
    """Shape and dtype of a tensor, known without its bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class NameMap:
    """How checkpoint tensors become parameters.

    targets: checkpoint name → parameter name (the first one, where a converter makes several).
    direct: parameter name → checkpoint name, where the tensor is the parameter, unchanged.
    unused: checkpoint names that the model does not instantiate.
    """

    targets: dict[str, str]
    direct: dict[str, str]
    unused: tuple[str, ...]


def map_names(model: nn.Module, checkpoint: Checkpoint) -> NameMap:
    """Translate checkpoint names as Transformers' loader does.

    Raises:
        CheckpointError: parameters of the model that the checkpoint has no tensor for.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    expected = model.state_dict()
    prefix = model.base_model_prefix
    targets, direct, unused = {}, {}, []
    for key in checkpoint.names():
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=expected)
        if name not in expected:
            unused.append(key)
            continue
        targets[key] = name
        if pattern is None:
            direct[name] = key
    if not any(converters):
        _check_complete(model, expected, direct, checkpoint)
    return NameMap(targets, direct, tuple(unused))


def _check_complete(model, expected, direct, checkpoint) -> None:
    tied = getattr(model, "all_tied_weights_keys", {}) or {}
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or []
    absent = [
        name
        for name in expected
        if name not in direct and name not in tied and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.directory} has no tensor for {absent[0]!r}{more} of {type(model).__name__}: "
            "the checkpoint is incomplete, or config.json describes another model"
        )


class StreamedModel:
    """A model and where its weights come from.

    Attributes:
        model: the module; parameters inside `blocks` are on the meta device unless loaded.
        checkpoint: the source, or None for a model that came as an object with its weights.
        blocks: names of the modules that are loaded one at a time.
        device: where loaded weights go.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint | None = None,
        device: torch.device | str = "cpu",
    ):
        self.model = model
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.blocks: tuple[str, ...] = ()
        self.names = map_names(model, checkpoint) if checkpoint is not None else None
        self.overrides: dict[str, torch.Tensor] = {}

    @property
    def is_streamed(self) -> bool:
        return self.checkpoint is not None

    def set_blocks(self, blocks: tuple[str, ...]) -> None:
        """Declare what streams; everything else is loaded now and stays."""
        self.blocks = tuple(blocks)
        if self.is_streamed:
            self._load([key for key, name in self.names.targets.items() if self.block_of(name) is None])
            self.model.tie_weights()
            self._check_present("", self.model, skip=self.blocks)

    def block_of(self, name: str) -> str | None:
        """The block that a parameter or module belongs to."""
        return next((block for block in self.blocks if name == block or name.startswith(block + ".")), None)

    def load(self, block: str) -> nn.Module:
        """The block with its weights."""
        module = self.model.get_submodule(block)
        if self.is_streamed:
            self._load([key for key, name in self.names.targets.items() if name.startswith(block + ".")])
            self._check_present(block + ".", module)
        return module

    def _check_present(self, prefix: str, module: nn.Module, skip: tuple[str, ...] = ()) -> None:
        """Every parameter must have come from the checkpoint."""
        for name, parameter in module.named_parameters(prefix=prefix.removesuffix(".")):
            if parameter.device.type == "meta" and not (skip and self.block_of(name)):
                raise CheckpointError(
                    f"{self.checkpoint.directory} has no tensor for {name!r} of {type(self.model).__name__}: "
                    "the checkpoint is incomplete, or config.json describes another model"
                )

    def release(self, block: str) -> None:
        """Give the block's weights back (a no-op for a model that came with its weights)."""
        if not self.is_streamed:
            return
        for module in self.model.get_submodule(block).modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                setattr(module, name, empty)
        trim_memory()

    @contextlib.contextmanager
    def loaded(self, block: str) -> Iterator[nn.Module]:
        module = self.load(block)
        try:
            yield module
        finally:
            self.release(block)

    @contextlib.contextmanager
    def streaming(self, edit=None) -> Iterator[nn.Module]:
        """The model as a callable: each block loads when it is entered and is released when it is left.

        edit: called with (block name, module) after a block has loaded, e.g. to put quantized weights in.
        """
        handles = []
        for block in self.blocks:
            module = self.model.get_submodule(block)

            def enter(module, args, block=block):
                self.load(block)
                if edit is not None:
                    edit(block, module)

            def leave(module, args, output, block=block):
                self.release(block)

            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave))
        try:
            yield self.model
        finally:
            for handle in handles:
                handle.remove()

    def source_name(self, parameter: str) -> str:
        """The checkpoint's name of a parameter (its own name where there is no checkpoint)."""
        if not self.is_streamed:
            return parameter
        if parameter not in self.names.direct:
            raise CheckpointError(
                f"{parameter} is not stored as one tensor of that shape in {self.checkpoint.directory} "
                "(Transformers fuses or splits it while loading), so it cannot be written back quantized"
            )
        return self.names.direct[parameter]

    def source_tensors(self) -> dict[str, TensorShape]:
        """Every tensor of the source under the name in which it is stored, tied copies left out."""
        if self.is_streamed:
            return {name: TensorShape(e.shape, e.dtype) for name, e in self.checkpoint.entries.items()}
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        state = self.model.state_dict()
        return {n: TensorShape(tuple(t.shape), t.dtype) for n, t in state.items() if n not in tied}

    def read_source(self, name: str) -> torch.Tensor:
        """One tensor of the source, by the name in which it is stored."""
        if self.is_streamed:
            return self.checkpoint.read_one(name)
        return self.model.state_dict()[name].detach().cpu()

    def _load(self, keys: list[str]) -> None:
        """Put checkpoint tensors into the model through Transformers' loader."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        dtype = getattr(self.model, "dtype", None)
        config = LoadStateDictConfig(
            device_map={"": str(self.device)},
            dtype=dtype,
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        with torch.no_grad(), _no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(self.model, self.checkpoint.read(keys), config)
        problems = [*(f"{n}: {a} in the file, {b} in the model" for n, a, b in info.mismatched_keys), *info.error_msgs]
        problems += [f"{name}: {error}" for name, error in (info.conversion_errors or {}).items()]
        if problems:
            raise CheckpointError(f"{self.checkpoint.directory}: {problems[0]}")


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Silence Transformers' per-load progress bar: here it would draw one a block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
