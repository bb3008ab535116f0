"""A tokenizer as llama.cpp has it inside a GGUF file.

Everything is read from the tokenizer that Transformers uses (its `tokenizer.json` form), so that both give the same
ids. Byte-level BPE becomes llama.cpp's "gpt2" with the name of a rule for cutting text into words; BPE over whole
sentences with a byte fallback, as SentencePiece makes it, becomes "llama", whose merges are scores.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from auto_round.logger import logger

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's kinds of tokens
SPACE = "▁"

# How text is cut into words before merging, as expressions; a tokenizer.json has them as steps.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"


def _cased(after: str, digits: str) -> str:
    """Words cut where capitals follow small letters, as in GPT-4o's and Tekken's expressions."""
    words = rf"{_START}{_UPPER}*{_LOWER}+{after}|{_START}{_UPPER}+{_LOWER}*{after}"
    return rf"{words}|{digits}|{_SIGNS}[\r\n/]*|{_TAIL}"


_LLAMA3 = rf"{_SHORT}|{_START}\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|{_TAIL}"
_QWEN2 = rf"{_SHORT}|{_START}\p{{L}}+|\p{{N}}|{_SIGNS}[\r\n]*|{_TAIL}"
_QWEN35 = rf"{_SHORT}|{_START}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
_DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _TAIL
)
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_cased(_SHORT + "?", r"\p{N}{1,3}"),), False): "gpt-4o",
    ((_cased(_SHORT + "?", r"\p{N}{1,3}"),), True): "gpt-4o",
    ((_cased("", r"\p{N}"),), True): "tekken",
    ((_cased("", r"\p{N}"),), False): "tekken",
    ((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK), False): "deepseek-v3",
}
"""(expressions in order, whether a word that is a token is taken whole) → llama.cpp's name (`src/llama-vocab.cpp`)."""


def tokenizer_values(tokenizer: Any, source_dir: Path | None, config: Any) -> dict[str, Any]:
    """Method of GGUFWriter without `add_` → value, for a tokenizer; loaded from `source_dir` where none is given.

    A model without one that llama.cpp can use gets the empty vocabulary, with a warning: it then takes token ids only.
    """
    if tokenizer is None and source_dir is not None:
        tokenizer = _load(source_dir)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    if parts["model"].get("type") not in ("BPE", "Unigram"):
        why = "there is no tokenizer" if tokenizer is None else f"{type(tokenizer).__name__} is no BPE and no Unigram"
        logger.warning("the GGUF file has no vocabulary (%s): llama.cpp will take token ids, and no text", why)
        return {"tokenizer_model": "no_vocab"}
    tokens, kinds = _tokens(parts, config.vocab_size)
    values: dict[str, Any] = {"token_list": tokens, "token_types": kinds}
    values |= _byte_level(parts) if _is_byte_level(parts) else _sentence_level(parts, tokens, kinds)
    return values | _special(tokenizer)


def _load(source_dir: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source_dir, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        logger.warning("the tokenizer of %s cannot be loaded: %s", source_dir, error)
        return None


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, out of their sequences."""
    if not part:
        return
    if part["type"] == "Sequence":
        for inside in next(value for key, value in part.items() if key != "type"):
            yield from _steps(inside)
        return
    yield part


def _is_byte_level(parts: Mapping[str, Any]) -> bool:
    steps = [*_steps(parts.get("pre_tokenizer")), *_steps(parts.get("decoder"))]
    return any(step["type"] == "ByteLevel" for step in steps)


def _tokens(parts: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Texts and kinds of as many tokens as the embedding has rows, by id; ids that no token has get a filler."""
    model = parts["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {text: number for number, (text, _) in enumerate(vocabulary)}
    found = {number: (text, NORMAL) for text, number in vocabulary.items()}
    if not _is_byte_level(parts):
        found |= {number: (text, BYTE) for number, (text, _) in found.items() if _is_byte(text)}
        found |= {vocabulary[text]: (text, UNKNOWN) for text in [_unknown(model)] if text in vocabulary}
    for added in parts.get("added_tokens") or ():
        kind = CONTROL if added["special"] else USER_DEFINED
        if found.get(added["id"], ("", NORMAL))[1] == UNKNOWN:
            continue
        text = added["content"]
        found[added["id"]] = (text if kind == CONTROL else text.replace(SPACE, " "), kind)
    if max(found) >= rows:
        logger.warning(
            "the tokenizer has %d tokens, the model %d: the GGUF file leaves the others out", len(found), rows
        )
    filled = [found.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    return [text for text, _ in filled], [kind for _, kind in filled]


def _unknown(model: Mapping[str, Any]) -> str | None:
    if model["type"] == "Unigram":
        return None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _pairs(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Merges, which older files write as one string."""
    for merge in model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield left, right


def _byte_level(parts: Mapping[str, Any]) -> dict[str, Any]:
    model = parts["model"]
    steps = list(_steps(parts.get("pre_tokenizer")))
    prefix = any(step.get("add_prefix_space") for step in steps)
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre_tokenizer(steps, bool(model.get("ignore_merges"))),
        "token_merges": [f"{left} {right}" for left, right in _pairs(model)],
        "add_space_prefix": prefix,
    }


def pre_tokenizer(steps: Sequence[Mapping[str, Any]], whole: bool) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text into words; "default", with a warning, if it has none.

    whole: words that are tokens are taken without merging.
    """
    expressions = tuple(_expressions(steps))
    name = PRE_TOKENIZERS.get((expressions, whole)) or PRE_TOKENIZERS.get((expressions, False))
    if name is None:
        logger.warning(
            "llama.cpp has no rule for how this tokenizer cuts text into words (%s): the GGUF file says 'default', "
            "and some texts will get other token ids than in Transformers",
            " then ".join(expressions) or "none",
        )
    return name or "default"


def _expressions(steps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for step in steps:
        if step["type"] == "Split":
            yield step["pattern"].get("Regex") or step["pattern"]["String"]
        elif step["type"] == "Digits":
            yield r"\p{N}" if step["individual_digits"] else r"\p{N}+"
        elif step["type"] == "ByteLevel":
            yield from [_GPT2] if step.get("use_regex", True) else []
        else:
            yield step["type"]


def _sentence_level(parts: Mapping[str, Any], tokens: Sequence[str], kinds: list[int]) -> dict[str, Any]:
    model = parts["model"]
    steps = [*_steps(parts.get("normalizer")), *_steps(parts.get("pre_tokenizer"))]
    prepended = any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
    values = {"add_space_prefix": prepended, "tokenizer_pre": "default"}
    if model["type"] == "BPE":
        return {**values, "tokenizer_model": "llama", "token_scores": _scores(model, tokens, kinds)}
    known = dict(model["vocab"])
    values |= {"tokenizer_model": "t5", "token_scores": [known.get(text, 0.0) for text in tokens]}
    table = next((step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"), None)
    return values if table is None else {**values, "precompiled_charsmap": base64.b64decode(table)}


def _scores(model: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> list[float]:
    """A token made by an earlier merge has a higher score, as llama.cpp merges by score.

    Tokens that no merge makes come last.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(model)):
        ranks.setdefault(left + right, rank)
    return [
        -float(ranks.get(text, len(ranks))) if kind == NORMAL else -1000.0 * (kind in (CONTROL, USER_DEFINED))
        for text, kind in zip(tokens, kinds, strict=True)
    ]


def _special(tokenizer: Any) -> dict[str, Any]:
    """Ids with a meaning, what is put around a text, and the chat template."""
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad", "sep", "mask")}
    values: dict[str, Any] = {f"{name}_token_id": value for name, value in ids.items() if isinstance(value, int)}
    around = tokenizer("a", add_special_tokens=True)["input_ids"]
    values["add_bos_token"] = ids["bos"] is not None and around[0] == ids["bos"]
    values["add_eos_token"] = ids["eos"] is not None and around[-1] == ids["eos"]
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = [{"name": name, "template": text} for name, text in template.items()]
    return {**values, "chat_template": template} if template else values
