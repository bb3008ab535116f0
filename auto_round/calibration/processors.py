"""A model's own processor: how conversations are put to it, which tokens stand for images, and how it is loaded."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from auto_round.calibration.hub import CalibrationDataError
from auto_round.calibration.media import EXTRAS, KINDS, Message, missing_extra, sampling_rate
from auto_round.calibration.samples import Sample
from auto_round.modeling.reading import UNTRUSTED, CheckpointError

_MEDIA_TOKEN = re.compile(r"image|img|pixel|vision|video|audio|speech|\b(boi|eoi|boa|eoa)_|media", re.IGNORECASE)


def media_token_ids(processor: Any) -> frozenset[int]:
    """Ids of all tokens that stand for images or audio, or that enclose them."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None or not hasattr(tokenizer, "convert_tokens_to_ids"):
        return frozenset()
    special = getattr(tokenizer, "special_tokens_map", {})
    named = {**vars(processor), **{key: value for key, value in special.items() if isinstance(key, str)}}
    values = [value for key, value in named.items() if "token" in key and _MEDIA_TOKEN.search(key)]
    flat = [*chain.from_iterable(value if isinstance(value, (list, tuple)) else [value] for value in values)]
    added = (str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values())
    known = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    words = [*map(str, flat), *(token for token in added if _MEDIA_TOKEN.search(token))]
    return frozenset(known[word] for word in words if word in known)


def forms_of(processor: Any, template: Any) -> list[Any]:
    """The ways in which a conversation can be given to a processor, the likeliest first.

    Each is called as form(processor, messages) and returns what the processor makes of it.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    plain = [partial(_plain, False), partial(_plain, True)]
    if template is not None:
        if len(os.fspath(template)) < 500 and os.path.isfile(template):
            template = Path(template).read_text(encoding="utf-8")
        return [partial(_chat, template, False), partial(_chat, template, True), partial(_inline, template)]
    from transformers import ProcessorMixin

    own = getattr(type(processor), "apply_chat_template", None) not in (None, ProcessorMixin.apply_chat_template)
    if getattr(processor, "chat_template", None) or own:
        return [partial(_chat, None, False), partial(_chat, None, True)]
    if getattr(tokenizer, "chat_template", None):
        return [partial(_inline, None), *plain]
    return plain


def _chat(template: str | None, strings: bool, processor: Any, messages: list[Message]) -> Any:
    """By the chat template; strings: some want a message that is text alone as a string."""
    turns = []
    for message in messages:
        texts = [part.get("text") for part in message["content"]]
        as_string = strings and None not in texts
        turns.append({**message, "content": "\n".join(texts) if as_string else list(message["content"])})
    options = {} if template is None else {"chat_template": template}
    return processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=False, **options
    )


def _inline(template: str | None, processor: Any, messages: list[Message]) -> Any:
    """By a chat template for text alone, the processor's tokens for images and audio in the text."""
    turns = [{**message, "content": _text(processor, message, True)} for message in messages]
    options = {} if template is None else {"chat_template": template}
    text = processor.tokenizer.apply_chat_template(turns, tokenize=False, **options)
    return processor(text=text, return_tensors="pt", add_special_tokens=False, **_media(processor, messages))


def _plain(tokens: bool, processor: Any, messages: list[Message]) -> Any:
    """Without a template: the text of the messages; some processors put the tokens for images in themselves."""
    text = "\n".join(_text(processor, message, tokens) for message in messages)
    return processor(text=text, return_tensors="pt", **_media(processor, messages))


def _text(processor: Any, message: Message, tokens: bool) -> str:
    places = {kind: _place(processor, kind) if tokens else "" for kind in KINDS}
    return "".join(part.get("text") or places.get(part["type"], "") for part in message["content"])


def _place(processor: Any, kind: str) -> str:
    tokenizer = getattr(processor, "tokenizer", None)
    return str(getattr(processor, f"{kind}_token", None) or getattr(tokenizer, f"{kind}_token", None) or f"<{kind}>")


def _media(processor: Any, messages: list[Message]) -> dict[str, Any]:
    """A processor's arguments for the images and audio of a conversation."""
    parts = [part for message in messages for part in message["content"]]
    images = [part["image"] for part in parts if part["type"] == "image"]
    audio = [part["audio"] for part in parts if part["type"] == "audio"]
    given: dict[str, Any] = {"images": images} if images else {}
    return given | ({"audio": audio, "sampling_rate": sampling_rate(processor)} if audio else {})


def tensors_of(output: Mapping[str, Any]) -> Sample:
    """What of a processor's output a model takes: its tensors."""
    sample = {}
    for key, value in output.items():
        if not isinstance(value, torch.Tensor):
            try:
                value = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):  # names, spans of text, lists of different lengths
                continue
        sample[key] = value
    labels = sample.pop("labels", None)  # a loss is of no use
    if labels is not None and "input_ids" not in sample:
        sample["decoder_input_ids"] = labels  # of speech: the text is what the decoder reads
    return sample


def load_processor(directory: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """The processor of a model's folder; None if the folder has none.

    Raises:
        MissingExtraError: it needs a library for images or audio that is not installed.
        CheckpointError: it needs code that is not trusted.
        CalibrationDataError: it cannot be loaded, or takes no text.
    """
    folder = Path(directory)
    files = [folder / name for name in ("processor_config.json", "preprocessor_config.json")]
    files = [file for file in files if file.is_file()]
    if not files:
        return None
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # Transformers raises ImportError, AttributeError or ValueError for a missing library
        if "trust_remote_code" in str(error):
            raise CheckpointError(f"the processor of {folder} {UNTRUSTED}") from error
        vision = any(re.search(r'image_|video_|"size"', file.read_text(encoding="utf-8")) for file in files)
        absent = [module for module in EXTRAS["vision"] if importlib.util.find_spec(module) is None]
        if isinstance(error, ImportError) or (vision and absent):
            raise missing_extra(error, {"image" if vision else "audio"}) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CalibrationDataError(
            f"The processor in {folder} cannot be loaded ({reason}); pass `processor`, or calibrate on text."
        ) from error
    if getattr(processor, "tokenizer", None) is None:
        raise CalibrationDataError(
            f"{folder} holds no processor that takes text beside images or audio, only a {type(processor).__name__}; "
            "pass `processor`, or calibrate on text."
        )
    return processor
