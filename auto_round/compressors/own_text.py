"""The data set "self": the model is brought into memory as a whole, writes its text, and gives its weights back.

What is written is kept batch by batch beside the run's work folder, so that a run that goes on later, or another run on
the same text, does not write it again. One rank writes; the others are told.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from auto_round.budget import DoesNotFitError
from auto_round.calibration.feed import vocabulary_size
from auto_round.calibration.hub import CalibrationDataError
from auto_round.calibration.self_text import SelfText, enough, rows_of
from auto_round.compressors.afford import Resources, allowed, resources
from auto_round.compressors.samples import longest_sample
from auto_round.compressors.weights import hash_config, hash_weights
from auto_round.logger import logger
from auto_round.report import size
from auto_round.store import fingerprint
from auto_round.utils.files import make_folder, sync

if TYPE_CHECKING:
    from auto_round.compressors.base import Compressor


def own_text(run: Compressor, folder: Path | None, chat: bool | None, tokens: int) -> list[list[int]]:
    """Documents of at least so many token ids that the model of a run writes.

    folder: where they are kept, None for nowhere. chat: whether it uses its chat template; None if it has one.

    Raises:
        DoesNotFitError: the whole model does not fit in memory. CalibrationDataError: it cannot write text.
    """
    template = getattr(run.tokenizer, "chat_template", None)
    if chat and not template:
        raise CalibrationDataError(
            'dataset="self:apply_chat_template": the tokenizer has no chat template; leave it out.'
        )
    chat = bool(template) if chat is None else chat
    found: list[list[int]] = []
    if run.ranks.main:
        seqlen = longest_sample(run.calibration.seqlen, run.model, run.tokenizer)
        writer = SelfText(run.model, run.tokenizer, seqlen, run.tune.seed, chat)
        with contextlib.closing(_batches(run, writer, folder)) as batches:
            found = enough(batches, tokens, seqlen)
    run.ranks.barrier()  # writing takes longer than an exchange may
    return json.loads(run.ranks.everyone(json.dumps(found).encode())[0])


def _batches(run: Compressor, writer: SelfText, folder: Path | None) -> Iterator[list[list[int]]]:
    """One batch after the other: those that an earlier run has kept, then new ones, each kept at once."""
    key, loaded = fingerprint(_facts(run, writer)), False
    with contextlib.ExitStack() as stack:
        for number in itertools.count():
            file = folder / f"self-{key}-{number:04}.safetensors" if folder is not None else None
            batch = _read(file) if file is not None else None
            if batch is None:
                if not loaded:
                    stack.enter_context(_whole(run, writer.seqlen))
                    loaded = True
                logger.info("the model writes its calibration text: batch %d", number + 1)
                batch = writer.batch(number)
                if file is not None:
                    _write(file, batch)
            yield batch


def _facts(run: Compressor, writer: SelfText) -> dict[str, Any]:
    """Everything that the text depends on."""
    streamed = run.streamed
    return {
        "source": streamed.checkpoint.fingerprint() if streamed.is_streamed else hash_weights(run.model),
        "config": hash_config(run.model, run.source_dir),
        "dtype": str(getattr(run.model, "dtype", None)),
        "template": getattr(run.tokenizer, "chat_template", None) if writer.chat else None,
        "vocabulary": len(run.tokenizer),
        "seqlen": writer.seqlen,
        "seed": writer.seed,
        "device": run.device.type,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


# ---- the whole model in memory -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _whole(run: Compressor, seqlen: int) -> Iterator[None]:
    """The model with all its weights.

    Raises:
        DoesNotFitError: it does not fit; block by block, every token would read all weights from the disk.
    """
    check_whole(run, seqlen, allowed(run, resources(Path(), run.device)))
    streamed = run.streamed
    try:
        for block in streamed.blocks:
            streamed.load(block)
        yield
    finally:
        for block in streamed.blocks:
            streamed.release(block)


def check_whole(run: Compressor, seqlen: int, there: Resources) -> None:
    """Refuse to write text with a model that does not fit as a whole beside the keys and values of a batch."""
    streamed, model = run.streamed, run.model
    weights = sum(p.nbytes for block in streamed.blocks for p in model.get_submodule(block).parameters())
    needed = (weights if streamed.is_streamed else 0) + rows_of(seqlen) * _row_bytes(model, seqlen)
    free = there.vram if run.device.type != "cpu" else there.ram
    if free is not None and needed > free:
        raise DoesNotFitError(
            f'dataset="self": to write text the model has to be in memory as a whole, which takes {size(needed)} with '
            f"the keys and values of {rows_of(seqlen)} texts, and {size(free)} can be had. Let a server that runs the "
            'model write the text and give it as a file (dataset="text.jsonl"), or leave dataset out for the built-in '
            "text; a smaller seqlen needs less beside the weights"
        )


def _row_bytes(model: nn.Module, seqlen: int) -> int:
    """Of one text while it is written: keys and values of all its tokens, and the logits of the last, sorted too."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    hidden, heads = getattr(config, "hidden_size", 4096), getattr(config, "num_attention_heads", None) or 1
    width = (getattr(config, "head_dim", None) or hidden // heads) * (
        getattr(config, "num_key_value_heads", None) or heads
    )
    itemsize = getattr(model, "dtype", torch.float32).itemsize
    return 2 * width * itemsize * getattr(config, "num_hidden_layers", 1) * seqlen + 16 * vocabulary_size(model)


# ---- what is kept ----------------------------------------------------------------------------------------------------


def _write(file: Path, documents: list[list[int]]) -> None:
    """Keep the documents of a batch, whole or not at all."""
    make_folder(file.parent)
    temporary = file.with_suffix(".tmp")
    ids = torch.tensor([token for document in documents for token in document], dtype=torch.int32)
    lengths = torch.tensor([len(document) for document in documents], dtype=torch.int64)
    save_file({"ids": ids, "lengths": lengths}, temporary)
    sync(temporary)
    temporary.replace(file)


def _read(file: Path) -> list[list[int]] | None:
    """The documents of a batch; None if there are none, or a damaged file, which is then written anew."""
    try:
        found = load_file(file)
        return [part.tolist() for part in found["ids"].split(found["lengths"].tolist())]
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, RuntimeError, ValueError, OSError) as error:
        logger.warning("%s is damaged (%s): the model writes its text again", file, error)
        return None
