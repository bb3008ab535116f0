"""Text that a model writes itself: sampled from its own distribution, in batches, as documents of token ids.

Such text lies where the model is sure of itself and in the form in which it is used, whatever it was trained on. A
model with a chat template plays both roles: it is given what the template writes before a user's words, writes those,
and answers them, thinking aloud where its template or its training makes it. Other models go on from their first token.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from auto_round.calibration.feed import special_ids, vocabulary_size
from auto_round.calibration.hub import CalibrationDataError, builtin_source, open_source

BATCH_TOKENS = 32768  # of the samples that are written together; a constant, since what is drawn depends on it
MOST_ROWS = 64
SEED_TOKENS = 4  # of a document of the built-in text, to begin with where the model has no token for the beginning
USER_TOKENS = 256  # at most, of a user's words
_WORDS = "calibration-words"  # stands for a user's words in a conversation, to see what the template puts around them


def rows_of(seqlen: int) -> int:
    """How many documents are written at once; follows from their length alone, so that it repeats."""
    return max(1, min(MOST_ROWS, BATCH_TOKENS // seqlen))


@dataclass(frozen=True)
class SelfText:
    """A model that writes text; its weights have to be in memory.

    seqlen: most tokens of a document. chat: whether it plays the roles of its chat template.
    """

    model: nn.Module
    tokenizer: Any
    seqlen: int
    seed: int
    chat: bool

    def batch(self, number: int) -> list[list[int]]:
        """Documents of one batch, `rows_of(seqlen)` of them or a little fewer; the same for the same number and seed.

        A document that the model has ended ends with the token that says so.

        Raises:
            CalibrationDataError: the chat template cannot be used so, or the model cannot generate.
        """
        if not hasattr(self.model, "generate"):
            raise CalibrationDataError(
                f'The data set "self" needs a model that generates text, and {type(self.model).__name__} does not: '
                "name another data set."
            )
        rows = rows_of(self.seqlen)
        prompts = self._questions(rows, number) if self.chat else self._beginnings(rows, number)
        prompts = [prompt[: self.seqlen - 1] for prompt in prompts]
        if not prompts:
            return []
        room = self.seqlen - max(map(len, prompts))
        answers = self._go_on(prompts, room, self._ends(), (number, 1))
        return [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]

    # ---- what the model goes on from -----------------------------------------------------------------------------

    def _beginnings(self, rows: int, number: int) -> list[list[int]]:
        """The token that the tokenizer puts before every text; else the first few tokens of built-in documents."""
        first = self.tokenizer("a")["input_ids"][:1]
        if first and first[0] == getattr(self.tokenizer, "bos_token_id", None):
            return [first] * rows
        records = itertools.cycle(open_source(builtin_source(), self.seed))
        chosen = itertools.islice(records, number * rows, (number + 1) * rows)
        texts = (str(record.get("text") if isinstance(record, dict) else record)[:200] for _, record in chosen)
        return [self._ids(text)[:SEED_TOKENS] for text in texts]

    def _questions(self, rows: int, number: int) -> list[list[int]]:
        """Conversations up to where the answer begins, with a user's words that the model has written."""
        before, after = self._frame()
        ends = self._ends() | set(self._ids(after)[:1] if after.strip() else ())
        start = self._ids(before)
        written = self._go_on([start] * rows, min(USER_TOKENS, max(1, self.seqlen // 4)), ends, (number, 0))
        words = (self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written)
        return [self._ids(self._render(text, answer=True)) for text in words if text]

    def _frame(self) -> tuple[str, str]:
        """What the chat template writes before and after a user's words."""
        before, found, after = self._render(_WORDS, answer=False).partition(_WORDS)
        if not found:
            raise CalibrationDataError(
                "The chat template does not show a user's words, so the model cannot play the user: "
                'use dataset="self:apply_chat_template=false"'
            )
        return before, after

    def _render(self, words: str, answer: bool) -> str:
        messages = [{"role": "user", "content": words}]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        except Exception as error:  # a template is a program of the checkpoint and may raise anything
            raise CalibrationDataError(
                f'The chat template refuses a user\'s message ({error}): use dataset="self:apply_chat_template=false"'
            ) from error

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    # ---- sampling ------------------------------------------------------------------------------------------------

    def _ends(self) -> set[int]:
        """Tokens that end a text."""
        configs = (self.tokenizer, getattr(self.model, "generation_config", None), getattr(self.model, "config", None))
        found = (getattr(config, "eos_token_id", None) for config in configs)
        return {one for ids in found if ids is not None for one in (ids if isinstance(ids, (list, tuple)) else [ids])}

    def _go_on(self, prompts: Sequence[list[int]], room: int, ends: set[int], turn: tuple[int, int]) -> list[list[int]]:
        """What the model writes after each prompt, at most `room` tokens of it, sampled at temperature 1."""
        from transformers import GenerationConfig

        device = next(self.model.parameters()).device
        width, ids, mask = max(map(len, prompts)), [], []
        for prompt in prompts:  # padded on the left, as text goes on at the right
            gap = width - len(prompt)
            ids.append([prompt[0]] * gap + prompt)
            mask.append([0] * gap + [1] * len(prompt))
        wanted = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=room,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
            suppress_tokens=sorted(self._never(ends)) or None,
            use_cache=True,
        )
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{self.seed}:{turn}".encode()).digest()[:8], "big"))
            inputs = torch.tensor(ids, device=device), torch.tensor(mask, device=device)
            out = self.model.generate(inputs[0], attention_mask=inputs[1], generation_config=wanted)
        return [_until(row[width:].tolist(), ends) for row in out.cpu()]

    def _never(self, ends: set[int]) -> set[int]:
        """Tokens with a meaning beside text (pictures, padding), and those that the tokenizer does not know."""
        size = vocabulary_size(self.model)
        known = set(self.tokenizer.get_vocab().values()) if hasattr(self.tokenizer, "get_vocab") else range(size)
        special = {token for token in special_ids(getattr(self.model, "config", None)) if 0 <= token < size}
        return (special | set(range(size)).difference(known)) - ends


def _until(ids: list[int], ends: Iterable[int]) -> list[int]:
    """Ids up to the first of `ends`, which is left in."""
    place = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: place + 1]


def enough(batches: Iterator[list[list[int]]], tokens: int, seqlen: int) -> list[list[int]]:
    """Documents of as many batches as hold `tokens` tokens, and one document more.

    Raises:
        CalibrationDataError: the model ends its texts at once, so that they would never be enough.
    """
    found: list[list[int]] = []
    held, allowed = 0, 4 + 16 * -(-(tokens + seqlen) // (rows_of(seqlen) * seqlen))
    for number, batch in enumerate(batches):
        found += batch
        held += sum(map(len, batch))
        if held >= tokens + seqlen:
            return found
        if number + 1 >= allowed:
            break
    raise CalibrationDataError(
        f"The model ends the texts that it writes after {held / max(1, len(found)):.0f} tokens on average, too few to "
        "calibrate on: name another data set."
    )
