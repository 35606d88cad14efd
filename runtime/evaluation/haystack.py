"""The text that a needle is hidden in: sentences of a given text, or generated ones that say nothing of numbers."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence

_WHO = (
    "the baker", "an old sailor", "the youngest of the sisters", "a travelling musician", "the schoolteacher",
    "a shepherd from the hills", "the owner of the inn", "a retired captain", "the new librarian", "the miller",
    "a painter from the city", "the keeper of the lighthouse", "a girl with a red scarf", "the village doctor",
    "a clockmaker", "the gardener",
)  # fmt: skip
_DID = (
    "watched", "described", "forgot about", "dreamed of", "painted", "wrote a letter about", "walked past",
    "told a story of", "went looking for", "sang about", "complained about", "returned to", "took care of",
    "wondered about", "laughed at", "drew a map of",
)  # fmt: skip
_WHAT = (
    "the wooden bridge", "a flock of geese", "the orchard behind the church", "the boats in the harbour",
    "an abandoned mill", "the first snow", "the market square", "a narrow path", "the copper kettle",
    "the fields of barley", "a broken fence", "the river in flood", "the stone well", "the garden wall",
    "a pair of grey horses", "the long summer evenings",
)  # fmt: skip
_WHEN = (
    "before the rain began", "while the bells were ringing", "on the way home", "long after sunset",
    "without saying a word", "as the fog lifted", "at the end of the harvest", "when nobody was listening",
    "during the fair", "in the shade of the oaks", "after a quiet breakfast", "because there was nothing else to do",
    "until the lamps were lit", "as in every other year", "on a cold morning", "with great patience",
)  # fmt: skip


def built_in_sentences(seed: int) -> Sequence[str]:
    """Return 65,536 different English sentences without digits, the same for the same seed."""
    parts = list(itertools.product(_WHO, _DID, _WHAT, _WHEN))
    random.Random(seed).shuffle(parts)
    return [f"{who[0].upper()}{who[1:]} {did} {what} {when}." for who, did, what, when in parts]


def split_sentences(text: str) -> Sequence[str]:
    """Return the sentences of a text, with single spaces; one without punctuation is one sentence."""
    words = " ".join(text.split())
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", words) if sentence]
