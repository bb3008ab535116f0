"""A model whose weights are present only while they are needed.

The model is built without weights (parameters on the meta device, computed buffers real). A block's weights are read
from the checkpoint when its turn comes and given back when it is done. A model object of the user's own is another
source of the same tensors: its weights are there already, so loading and releasing do nothing.

Fused modules that were replaced are there twice: the model holds the new ones, and the original ones can be put back
for a moment (`original=True`), to compare the two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from auto_round.modeling.checkpoint import Checkpoint, CheckpointError
from auto_round.modeling.fused_moe.replace_modules import Replaced, apply_replacements, release, scatter
from auto_round.modeling.name_map import NameMap, Renamer, adapt_names, map_names, own_names
from auto_round.utils.device import trim_memory


class TensorShape(NamedTuple):
    """Shape and dtype of a tensor, known without its bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class StreamedModel:
    """A model and where its weights come from.

    Attributes:
        model: the module; parameters inside `blocks` are on the meta device unless loaded.
        checkpoint: the source, or None for a model that came as an object with its weights.
        blocks: names of the modules that are loaded one at a time.
        device: where loaded weights go.
        replaced: fused modules that were replaced, by name.
        names: how the checkpoint's tensors become the parameters of the model as it is now.
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
        self._renamer = None if checkpoint is None else Renamer(model)
        self.original_names = NameMap() if checkpoint is None else map_names(model, checkpoint, self._renamer)
        self.replaced: dict[str, Replaced] = apply_replacements(model)
        if checkpoint is None:
            self.names, self._split = own_names(model), set()
        else:
            self.names, self._split = adapt_names(self.original_names, self.replaced, self._renamer)
        # Tensors of single experts, which go to those experts' layers past Transformers' fusing converter.
        self._parted = set(self.names.direct.values()) - set(self.original_names.direct.values())
        self._swapped = False
        # Of a model whose parameters are tied across its blocks (layers that share weights under several names).
        self.ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})

    @property
    def is_streamed(self) -> bool:
        return self.checkpoint is not None

    def set_blocks(self, blocks: Sequence[str]) -> None:
        """Declare what streams; everything else is loaded now and stays."""
        self.blocks = tuple(blocks)
        if self.is_streamed:
            self._load_where(lambda name: self.block_of(name) is None)
            self._initialize_unstored()
            with self.as_original(list(self.replaced)):
                self.model.tie_weights()
            self._load_tied(None)
            self._check_present("", self.model, skip=self.blocks)

    def _initialize_unstored(self) -> None:
        """Fill parameters that checkpoints of this model leave out, since its class computes them."""
        for name in self.original_names.computed:
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            empty = torch.empty_like(getattr(module, leaf), device=self.device)
            setattr(module, leaf, nn.Parameter(empty, requires_grad=False))
            self.model._init_weights(module)

    def _load_tied(self, block: str | None) -> None:
        """Give parameters that are tied to another block's that one's tensor."""
        absent = {
            name: self.ties[name]
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if parameter.device.type == "meta" and name in self.ties and self.block_of(name) == block
        }
        for home in dict.fromkeys(self.block_of(other) for other in absent.values()):
            if home is None or home == block:
                continue
            self._load_where(lambda name, home=home: name.startswith(f"{home}."))
            for name, other in absent.items():
                if self.block_of(other) == home:
                    _set_parameter(self.model, name, self.model.get_parameter(other))
            self.release(home)
        for name, other in absent.items():
            if self.block_of(other) == block or self.block_of(other) is None:
                _set_parameter(self.model, name, self.model.get_parameter(other))

    def block_of(self, name: str) -> str | None:
        """The block that a parameter or module belongs to."""
        return next((block for block in self.blocks if name == block or name.startswith(block + ".")), None)

    def has_replaced(self, block: str) -> bool:
        """Whether a block holds modules that were replaced and whose originals are still known."""
        return any(name.startswith(f"{block}.") for name in self.replaced)

    def load(self, block: str) -> nn.Module:
        """The block with its weights."""
        module = self.model.get_submodule(block)
        if self.is_streamed:
            self._load_where(lambda name: name.startswith(f"{block}."))
            self._load_tied(block)
            self._check_present(block + ".", module)
        return module

    def _load_where(self, wanted) -> None:
        """Put checkpoint tensors into the parameters whose name is `wanted`."""
        names = self.original_names if self._swapped else self.names
        keys = {key for name, key in names.direct.items() if wanted(name)}
        split = {} if self._swapped else {name: self.replaced[name] for name in self._split if wanted(f"{name}.")}
        for group in names.groups.values():
            cut = group.fused and not self._swapped
            if not cut and any(wanted(name) for name in group.written):
                keys.update(group.sources)
        parted = set() if self._swapped else keys & self._parted
        self._load(sorted(keys - parted), convert=True)
        self._load(sorted(parted), convert=False)
        if split:
            self._load_split(split)

    def _load_split(self, split: dict[str, Replaced]) -> None:
        """Load fused modules as Transformers does, and cut the layers' weights out of them."""
        with self.as_original(list(split)):
            names = self.original_names
            keys = {key for own, key in names.direct.items() if _is_inside(own, split)}
            for group in names.groups.values():
                if any(_is_inside(own, split) for own in group.written):
                    keys.update(group.sources)
            self._load(sorted(keys), convert=True)
        for pair in split.values():
            scatter(pair.original, pair.new)
            release(pair.original, pair.new)

    @contextlib.contextmanager
    def as_original(self, names: Sequence[str]) -> Iterator[None]:
        """Put original modules back in the place of the replaced ones."""
        for name in names:
            self.model.set_submodule(name, self.replaced[name].original)
        try:
            yield
        finally:
            for name in names:
                self.model.set_submodule(name, self.replaced[name].new)

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
    def loaded(self, block: str, original: bool = False) -> Iterator[nn.Module]:
        """The block with its weights; with `original`, in the structure that the model came in."""
        names = [name for name in self.replaced if original and name.startswith(f"{block}.")]
        with self.as_original(names):
            self._swapped = bool(names)
            try:
                yield self.load(block)
            finally:
                self.release(block)
                self._swapped = False

    def forget_originals(self) -> None:
        """Drop the fused modules of a model in memory: they hold its experts a second time."""
        if not self.is_streamed:
            for pair in self.replaced.values():
                release(pair.original, pair.new)

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
        """The name under which a parameter is written (its own name where there is no checkpoint)."""
        return self.names.written(parameter)

    def source_tensors(self) -> dict[str, TensorShape]:
        """Every tensor of the source under the name in which it is stored, tied copies left out."""
        if self.is_streamed:
            return {name: TensorShape(e.shape, e.dtype) for name, e in self.checkpoint.entries.items()}
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        state = self.model.state_dict()
        return {self.source_name(n): TensorShape(tuple(t.shape), t.dtype) for n, t in state.items() if n not in tied}

    def read_source(self, name: str) -> torch.Tensor:
        """One tensor of the source, by the name in which it is stored."""
        if self.is_streamed:
            return self.checkpoint.read_one(name)
        own = next((own for own, written in self.names.direct.items() if written == name), name)
        return self.model.state_dict()[own].detach().cpu()

    def _load(self, keys: Sequence[str], convert: bool) -> None:
        """Put checkpoint tensors into the model through Transformers' loader, with or without its converters."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        if not keys:
            return
        # Converters collect tensors while they work, so a load that needs some gets its own.
        renamer = Renamer(self.model) if convert and self._renamer.converters else self._renamer
        config = LoadStateDictConfig(
            device_map={"": str(self.device)},
            dtype=getattr(self.model, "dtype", None),
            weight_mapping=renamer.transforms if convert else renamer.renamings,
        )
        with torch.no_grad(), _no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(self.model, self.checkpoint.read(keys), config)
        problems = [*(f"{n}: {a} in the file, {b} in the model" for n, a, b in info.mismatched_keys), *info.error_msgs]
        problems += [f"{name}: {error}" for name, error in (info.conversion_errors or {}).items()]
        if problems:
            raise CheckpointError(f"{self.checkpoint.directory}: {problems[0]}")


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


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
