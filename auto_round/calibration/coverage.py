"""What calibration text covers: how much of the vocabulary, in which scripts, from how many documents.

A quantized model is only checked and tuned where its text leads it, so a person should see what that leaves out.
"""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from auto_round.calibration.samples import CalibrationData, Sample, is_token_sample

LEAST_SHARE = 0.001  # of the letters: scripts below are not listed
_NAMES = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "HANGUL": "Hangul"}


def coverage(data: CalibrationData, tokenizer: Any, vocabulary: int) -> dict[str, Any]:
    """Plain values for the report.

    Args:
        vocabulary: how many tokens the model embeds.

    Returns:
        documents: number of them, None where it is not known. vocabulary_seen: share of the tokens of the vocabulary
        that occur. scripts: script → share of the letters, the commonest first; empty without a tokenizer.
    """
    samples = [sample for sample in data.samples if is_token_sample(sample)]
    if not samples:
        return {"documents": data.documents}
    seen = torch.cat([sample["input_ids"].reshape(-1) for sample in samples]).unique()
    return {
        "documents": data.documents,
        "vocabulary_seen": round(len(seen) / max(1, vocabulary), 4),
        "scripts": scripts(_texts(samples, tokenizer)),
    }


def _texts(samples: Sequence[Sample], tokenizer: Any) -> list[str]:
    if tokenizer is None or not hasattr(tokenizer, "decode"):
        return []
    return [tokenizer.decode(sample["input_ids"].reshape(-1).tolist(), skip_special_tokens=True) for sample in samples]


def scripts(texts: Sequence[str]) -> dict[str, float]:
    """Script → share of the letters that are of it, by the names that Unicode gives them; the commonest first."""
    counts: Counter[str] = Counter()
    for letter, number in sum((Counter(text) for text in texts), Counter()).items():
        if letter.isalpha():
            counts[_script(letter)] += number
    total = sum(counts.values())
    shares = {script: round(number / total, 4) for script, number in counts.most_common()}
    return {script: share for script, share in shares.items() if share >= LEAST_SHARE}


@functools.cache
def _script(letter: str) -> str:
    """The first word of a letter's name, which is its script's for almost all letters."""
    word = unicodedata.name(letter, "UNNAMED").split()[0].split("-")[0]
    return _NAMES.get(word, word.capitalize())
