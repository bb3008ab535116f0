"""The chain of hidden states through the blocks: the original's and the quantized model's, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import nn

from auto_round.calibration.block_io import (
    Activations,
    BlockCall,
    BlockIO,
    Placement,
    first_tensor,
    micro_batch,
    same_length_batches,
)
from auto_round.calibration.capture import Captured

Amp = Callable[[], AbstractContextManager]


class Chain:
    """Activations of every sample at the block whose turn it is.

    clean: what enters the block in the original model; noisy: what enters it after quantized blocks. They are one
    object until the first quantized output is known.
    """

    def __init__(
        self,
        captured: Captured,
        masks: list[torch.Tensor | None],
        device: torch.device,
        amp: Amp,
        placement: Placement,
    ):
        self.calls: dict[str, BlockCall] = captured.calls
        self.hidden_dim = captured.hidden_dim
        self.clean = captured.first_hidden
        self.noisy: Activations | None = None
        self.lengths = [self.clean.shape(index)[self.hidden_dim + 1] for index in range(len(self.clean))]
        self.masks = masks
        self.device = device
        self.amp = amp
        self._placement = placement

    def io(self, block: str) -> BlockIO:
        """What an algorithm learns from: quantized inputs and original outputs (once `advance_clean` has run)."""
        return BlockIO(
            self.calls[block], self.noisy, self.clean, self.lengths, self.masks, self.hidden_dim, self.device
        )

    def keep_inputs(self) -> None:
        """Before the clean chain moves on: the first block's quantized inputs are the original ones."""
        if self.noisy is None:
            self.noisy = self._placement.new("noisy", len(self.clean), self.clean.nbytes)
            self.copy_clean()

    def copy_clean(self) -> None:
        """Let the quantized chain start anew from the original's states (quantized inputs switched off)."""
        for index in range(len(self.clean)):
            self.noisy.put(index, self.clean.get(index))

    def advance(self, block: str, module: nn.Module, store: Activations, batch_size: int) -> None:
        """Replace every sample's input in `store` by the block's output for it."""
        call = self.calls[block]
        size = micro_batch(self.lengths, self.device, batch_size) if call.batches else 1
        with torch.no_grad():
            for indices in same_length_batches(self.lengths, size):
                args, kwargs = call.arguments(indices, store.batch(indices, self.hidden_dim, self.device))
                with self.amp():
                    output = first_tensor(module(*args, **kwargs))
                for index, part in zip(indices, output.split(1, self.hidden_dim), strict=True):
                    store.put(index, part)

    def close(self) -> None:
        for store in (self.clean, self.noisy):
            if store is not None:
                store.close()


@contextlib.contextmanager
def importance_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """While open, collect the mean square of each input channel of each layer; layers that never run are absent."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    found: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def collect(module, args):
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            sums[name] = sums.get(name, 0) + x.square().sum(0)
            counts[name] = counts.get(name, 0) + x.shape[0]

        return collect

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found.update({name: total / counts[name] for name, total in sums.items()})
