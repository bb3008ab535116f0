"""Records of images, audio and text as conversations, and the images and audio read from where they are."""

from __future__ import annotations

import importlib.util
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from auto_round.calibration.data import normal_messages
from auto_round.calibration.hub import CalibrationDataError, MissingExtraError

KINDS = ("image", "audio")
Message = dict[str, Any]  # {"role": str, "content": [{"type": "text", "text": …} | {"type": "image", "image": …} | …]}

_MARKER = re.compile(r"\s*<(image|audio)>\s*")
_TIMEOUT = 30  # seconds for an image of the network
_RATE = 16_000  # samples per second of audio, where the processor does not say
EXTRAS = {"vision": ("PIL", "torchvision"), "audio": ("soundfile", "soxr", "librosa", "torchaudio", "torchcodec")}


class SkipError(Exception):
    """A record is of no use: (why, in the words of a note about several of them; the details)."""


@dataclass(frozen=True)
class Places:
    """Where the files are that records name: folders by kind, and the site that has those in none of them."""

    folders: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    site: str | None = None


# ---- records ----


def listed(record: Mapping[str, Any], kind: str) -> list[Any]:
    """The images (or what else `kind` names) of a record, under its name or its plural."""
    one, many = record.get(kind), record.get(f"{kind}s")
    given = one if kind == "image" and isinstance(one, (list, tuple)) else [one]
    given = [*given, *([] if many is None else many)]
    return [value for value in given if value is not None and not (isinstance(value, str) and not value)]


def conversation(where: str, record: Any) -> list[Message]:
    """A record as a conversation in the chat format of Transformers, its images and audio as the record gives them.

    A marker <image> or <audio> in a text is the place of the record's next image or audio; those without a marker
    open the first message of the user.
    """
    record = {"text": record} if isinstance(record, str) else record
    if not isinstance(record, Mapping):
        raise CalibrationDataError(f"{where} is a {type(record).__name__}; give a mapping with images, audio and text.")
    turns = next((record[name] for name in ("messages", "conversations") if name in record), None)
    if turns is None:
        turns = [{"role": "user", "content": record.get("text") or ""}]
    media = {kind: listed(record, kind) for kind in KINDS}
    messages = [
        {"role": turn["role"], "content": _parts(where, turn["content"], media)}
        for turn in normal_messages(where, turns)
    ]
    first = next((message for message in messages if message["role"] == "user"), messages[0] if messages else None)
    if first is None:
        raise CalibrationDataError(f"{where} holds an empty conversation; give at least one message.")
    first["content"][:0] = [{"type": kind, kind: value} for kind in KINDS for value in media[kind]]
    return messages


def _parts(where: str, content: Any, media: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The parts of a message; takes the images that it has a place for out of `media`."""
    if isinstance(content, str):
        return _marked(content, media)
    if not isinstance(content, (list, tuple)) or not all(isinstance(p, Mapping) and "type" in p for p in content):
        raise CalibrationDataError(f'{where} has a message that is neither text nor a list of {{"type": …}}.')
    return [_part(part, media) for part in content]


def _marked(text: str, media: dict[str, list[Any]]) -> list[dict[str, Any]]:
    parts, end = [], 0
    for match in _MARKER.finditer(text):
        kind = match.group(1)
        if media[kind]:
            parts += [{"type": "text", "text": text[end : match.start()]}, {"type": kind, kind: media[kind].pop(0)}]
            end = match.end()
    parts.append({"type": "text", "text": text[end:]})
    return [part for part in parts if part["type"] != "text" or part["text"]]


def _part(part: Mapping[str, Any], media: dict[str, list[Any]]) -> dict[str, Any]:
    kind = str(part["type"]).removesuffix("_url")
    if kind not in KINDS:
        return dict(part)
    keys = (kind, f"{kind}_url", "url", "path", "base64")
    value = next((part[key] for key in keys if part.get(key) is not None), None)
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    if value is None and media[kind]:
        value = media[kind].pop(0)
    return {"type": kind, kind: value}


# ---- files ----


def with_media(messages: list[Message], processor: Any, places: Places) -> list[Message]:
    """The conversation with its images read, as RGB images of Pillow, and its audio, as float32 arrays [samples]."""
    rate = sampling_rate(processor)
    return [{**m, "content": [_read_part(part, rate, places) for part in m["content"]]} for m in messages]


def sampling_rate(processor: Any) -> int:
    """Samples per second of the audio that a processor takes."""
    parts = (getattr(processor, name, None) for name in ("feature_extractor", "audio_processor"))
    return next((part.sampling_rate for part in parts if hasattr(part, "sampling_rate")), _RATE)


def _read_part(part: dict[str, Any], rate: int, places: Places) -> dict[str, Any]:
    kind = part["type"]
    if kind not in KINDS:
        return part
    try:
        return {"type": kind, kind: _image(part[kind], places) if kind == "image" else _audio(part[kind], rate, places)}
    except ImportError as error:
        raise missing_extra(error, {kind}) from error
    except Exception as error:  # whatever a decoder raises for a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise SkipError("their image or audio cannot be read", reason) from error


def _image(value: Any, places: Places) -> Any:
    from PIL import Image
    from transformers.image_utils import load_image

    if isinstance(value, Mapping):  # as the hub's data sets hold them
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        value = Image.open(io.BytesIO(value))
    elif isinstance(value, (np.ndarray, torch.Tensor)):
        value = Image.fromarray(np.asarray(value))
    elif isinstance(value, (str, os.PathLike)):
        return load_image(_find(os.fspath(value), "image", places), timeout=_TIMEOUT)
    return load_image(value)


def _audio(value: Any, rate: int, places: Places) -> np.ndarray:
    """Samples float32 [n] at `rate` per second; several channels are averaged."""
    given = rate
    if isinstance(value, Mapping) and value.get("array") is not None:
        value, given = value["array"], value.get("sampling_rate") or rate
    elif isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, (str, os.PathLike)):
        from transformers.audio_utils import load_audio

        value = load_audio(_find(os.fspath(value), "audio", places), sampling_rate=rate)
    array = np.asarray(value, dtype=np.float32)
    if array.ndim == 2:
        array = array.mean(axis=0 if array.shape[0] < array.shape[1] else 1)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"audio of shape {list(array.shape)}; give samples [n]")
    if given != rate:
        import soxr

        array = soxr.resample(array, given, rate)
    return array


def _find(name: str, kind: str, places: Places) -> str:
    """The path of a file that a record names, or its address."""
    if name.startswith(("http://", "https://", "data:")):
        return name
    for folder in places.folders.get(kind, ()):
        path = folder / Path(name).expanduser()
        if path.is_file():
            return str(path)
    if places.site is not None:
        return places.site + Path(name).name
    folders = ", ".join(str(folder) for folder in places.folders.get(kind, ())) or "any folder"
    raise FileNotFoundError(f"{name[:100]!r} is not in {folders}; name its folder with extra_data_dir")


# ---- libraries ----


def missing_extra(error: BaseException, kinds: set[str]) -> MissingExtraError:
    """What to install, when images or audio (`kinds`) need a library that is not there."""
    text = " ".join(str(error).split())
    named = [extra for extra, modules in EXTRAS.items() if any(m.lower() in text.lower() for m in modules)]
    extra = named[0] if named else "audio" if kinds == {"audio"} else "vision"
    absent = ", ".join(module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None)
    return MissingExtraError(
        f"{' and '.join(sorted(kinds)) or extra} data needs a library that is not installed ({text[:200]}"
        f'{f"; not there: {absent}" if absent else ""}): pip install "auto-round[{extra}]".'
    )
