"""Prompts that hide a pass key in a long text, of exact lengths, with the key at given depths.

The task is that of Mohtashami and Jaggi (arXiv 2305.16300), over the grid of lengths and depths of G. Kamradt's "needle
in a haystack" (2023).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.haystack import built_in_sentences, split_sentences

DEPTHS = tuple(tenth / 10 for tenth in range(11))
SMALLEST_LENGTH = 512
ANSWER_TOKENS = 16
"""Room for the answer, which counts to a prompt's length: a key has 7 digits, a token has one at least."""

_INTRODUCTION = (
    "There is a pass key hidden in a lot of irrelevant text. Find it and memorise it. "
    "You will be asked for it at the end."
)
_NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = " What is the pass key? The pass key is"
_ANSWER = " {key}"
_KEYS = range(10**6, 10**7)

# sentences that are tokenised at a time, and tokens of them that texts are taken from where contexts are shorter
_BATCH = 1024
_LEAST_TOKENS = 1 << 15


@dataclass(frozen=True)
class NeedlePrompt:
    """One prompt.

    Attributes:
        length: tokens of the context that the prompt fills, room for the answer included.
        depth: where the needle was to go, 0 (first) to 1 (right before the question).
        key: what is asked for.
        token_ids: the prompt, ``length - ANSWER_TOKENS`` tokens.
        answer_ids: the right answer.
        needle_start: the needle's first token in ``token_ids``.
    """

    length: int
    depth: float
    key: str
    token_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    needle_start: int


@dataclass(frozen=True)
class NeedlePlan:
    """The prompts that every arm reads.

    Attributes:
        prompts: length by length, depth by depth.
        seed: that keys and texts were drawn with.
    """

    prompts: tuple[NeedlePrompt, ...]
    seed: int


def default_lengths(max_positions: int) -> tuple[int, ...]:
    """Return the powers of two from :data:`SMALLEST_LENGTH` to the model's positions, the answer's room included."""
    return tuple(
        1 << power
        for power in range(SMALLEST_LENGTH.bit_length() - 1, max(1, max_positions).bit_length())
    )


def plan_needles(
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    *,
    num_samples: int = 1,
    seed: int = 1234,
    haystack: str | None = None,
) -> NeedlePlan:
    """Build the prompts: one per length, depth and sample.

    The needle goes between two sentences, those nearest to its depth. Key and text depend on length and sample only,
    so depths differ by the needle's place and nothing else.

    Args:
        tokenizer: of transformers.
        lengths: tokens of the contexts, room for the answer included.
        depths: of the needle, 0 to 1.
        num_samples: prompts of each length and depth, with different keys and texts.
        seed: of keys and texts.
        haystack: a text to hide the key in, repeated where it is short; None takes generated sentences.

    Raises:
        EvaluationError: there is no length, depth or sample; a depth is not between 0 and 1; a length has no room for
            needle and question; or the haystack has no text.
    """
    if not lengths or not depths or num_samples < 1:
        raise EvaluationError(
            "there is nothing to retrieve: give at least one length (without any, powers of two from "
            f"{SMALLEST_LENGTH} to the model's positions are taken), one depth and one sample"
        )
    wrong = [depth for depth in depths if not 0 <= depth <= 1]
    if wrong:
        raise EvaluationError(f"the depth is {wrong[0]}: give a number from 0 to 1")
    sentences = built_in_sentences(seed) if haystack is None else split_sentences(haystack)
    builder = _Builder(tokenizer, sentences, max(lengths))
    prompts = [
        builder.build(length, depth, random.Random(f"{seed}:{length}:{sample}"))
        for length in lengths
        for depth in depths
        for sample in range(num_samples)
    ]
    return NeedlePlan(tuple(prompts), seed)


class _Builder:
    """Puts prompts together from tokenised parts, so that their lengths are exact."""

    def __init__(self, tokenizer: Any, sentences: Sequence[str], most_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._head: list[int] = list(tokenizer(_INTRODUCTION)["input_ids"])
        self._question = self._continue(".", _QUESTION)
        self._text = "\n".join(sentences)
        self._sentences: list[list[int]] = []
        count = 0
        for first in range(0, len(sentences), _BATCH):
            if count >= max(most_tokens, _LEAST_TOKENS):
                break
            some = [f" {sentence}" for sentence in sentences[first : first + _BATCH]]
            self._sentences += self._continue_all(".", some)
            count = sum(map(len, self._sentences))
        if not count:
            raise EvaluationError("the haystack has no text: give one with sentences")

    def build(self, length: int, depth: float, generator: random.Random) -> NeedlePrompt:
        key = str(generator.choice(_KEYS))
        while key in self._text:
            key = str(generator.choice(_KEYS))
        needle = self._continue(".", _NEEDLE.format(key=key))
        fixed = len(self._head) + len(needle) + len(self._question) + ANSWER_TOKENS
        room = length - fixed
        if room < 0:
            raise EvaluationError(
                f"a context of {length} tokens has no room for needle, question and answer: give at least {fixed}"
            )
        text, ends = self._fill(room, generator.randrange(len(self._sentences)))
        place = min(ends, key=lambda end: abs(end - depth * room))
        token_ids = [*self._head, *text[:place], *needle, *text[place:], *self._question]
        return NeedlePrompt(
            length=length,
            depth=depth,
            key=key,
            token_ids=tuple(token_ids),
            answer_ids=tuple(self._continue(_QUESTION, _ANSWER.format(key=key))),
            needle_start=len(self._head) + place,
        )

    def _fill(self, room: int, first: int) -> tuple[list[int], list[int]]:
        """Return ``room`` tokens of sentences, the last one cut, and where sentences end; 0 is such a place, too."""
        text: list[int] = []
        ends = [0]
        while len(text) < room:
            text += self._sentences[first % len(self._sentences)]
            first += 1
            ends.append(min(len(text), room))
        return text[:room], ends

    def _continue(self, before: str, text: str) -> list[int]:
        return self._continue_all(before, [text])[0]

    def _continue_all(self, before: str, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts as they are behind ``before``; many tokenizers treat a beginning otherwise."""
        together = [before, *(before + text for text in texts)]
        head, *wholes = self._tokenizer(together, add_special_tokens=False)["input_ids"]
        return [list(whole[len(head) :]) for whole in wholes]
