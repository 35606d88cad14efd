"""The text of a sequence, token by token, as it becomes certain.

The joined pieces are exactly what decoding all tokens at once gives, up to a stop string. So a piece is held back
while a later token can still change it: half a character, a run of byte tokens (if one byte of a run is invalid,
tokenizers replace all of it), and what may turn out to be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

_REPLACEMENT = "\ufffd"

_MOST_TOKENS = 8
"""Tokens that are decoded again with each new one, before those that are done with are left out."""


class Detokenizer:
    """Turns the tokens of one sequence into text.

    Decoders look back, and some treat the first token in their own way (they strip its space). Hence a window of
    the last tokens is decoded at each step, and what is new at its end is taken. The window begins between two
    characters, and its beginning has text already, so that what comes later is not the first.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        """Begin a text.

        Args:
            tokenizer: of transformers.
            stops: strings that end the text, none of them empty.
        """
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        # what a text can end with that ends in a stop string's beginning
        self._stop_characters = frozenset(character for stop in stops for character in stop[:-1])
        self._backend = _backend(tokenizer)
        self._window: list[int] = []
        self._num_sent = (
            0  # characters of the window's text that were handed on to the search for stops
        )
        self._num_bytes = 0  # tokens at the window's end that are a run of bytes
        self._clean = 0  # a place in the window, between two characters and outside runs
        self._held = ""  # the end of the text that may be the beginning of a stop string
        self._is_finished = False
        self._stop: str | None = None

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text; None if none did."""
        return self._stop

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._stop is not None

    def append(self, token_id: int) -> str:
        """Add a token and return what became certain of the text, often nothing.

        After a stop string, or :meth:`finish`, the text does not change any more.
        """
        if self._is_finished:
            return ""
        self._window.append(token_id)
        if self._is_byte(token_id) or (self._num_bytes and self._is_skipped(token_id)):
            self._num_bytes += 1
            return ""
        self._num_bytes = 0
        text = self._decode(self._window)
        if not text.endswith(_REPLACEMENT):
            new = text[self._num_sent :]
            self._num_sent = len(text)
            self._shorten()
            return self._until_stop(new)
        # only the last one can be the beginning of a character: one that goes on is replaced by one
        new = text[self._num_sent : -1]
        self._num_sent += len(new)
        return self._until_stop(new)

    def finish(self) -> str:
        """Return what was held back: no token follows. Half a character becomes U+FFFD."""
        if self._is_finished:
            return ""
        new = self._until_stop(self._decode(self._window)[self._num_sent :]) + self._held
        self._held = ""
        self._is_finished = True
        return new

    def _until_stop(self, new: str) -> str:
        """Add certain text and return what of it cannot belong to a stop string, or what precedes one.

        Of several stop strings it is the one that ends first, and of these the longest: the same however the text
        came in pieces.
        """
        text = self._held + new
        found = [
            (text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text
        ]
        if found:
            end, _, self._stop = min(found)
            self._is_finished = True
            self._held = ""
            return text[: end - len(self._stop)]
        num_held = 0
        if text and text[-1] in self._stop_characters:
            num_held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def _shorten(self) -> None:
        """Let the window begin at the last clean place, if it is long and there is text behind that; note this one."""
        if len(self._window) > _MOST_TOKENS:
            rest = self._window[self._clean :]
            text = self._decode(rest)
            if not text:
                return
            self._window, self._num_sent = rest, len(text)
        self._clean = len(self._window)

    def _decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        if self._backend is not None:
            return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))
        # cleaning up spaces changes text that was certain, and most tokenizers do without it
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _is_byte(self, token_id: int) -> bool:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return (
            token is not None
            and len(token) == 6
            and token.startswith("<0x")
            and token.endswith(">")
        )

    def _is_skipped(self, token_id: int) -> bool:
        """Whether decoding leaves the token out, so that it does not end a run of bytes."""
        if self._tokenizer.convert_ids_to_tokens(token_id) is None:
            return True
        whole = self._decode([token_id], skip_special_tokens=False)
        return bool(whole) and not self._decode([token_id])


def _backend(tokenizer: Any) -> Any:
    """Return what a fast tokenizer decodes with, None where the tokenizer adds something of its own to that."""
    kind = type(tokenizer)
    is_plain = (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerFast.decode
        and kind._decode is PreTrainedTokenizerFast._decode
    )
    # transformers checks its arguments for longer than the backend takes to decode a few tokens
    return tokenizer.backend_tokenizer if is_plain else None


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` are the beginning of ``stop``, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
