"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fp8kv.runtime.detokenizer import Detokenizer
from fp8kv.runtime.requests import TokenLogprob

_REPLACEMENT = "\ufffd"

_LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have; so in OpenAI's API."""


class TokenNames:
    """Says how single tokens are shown. The event loop's only."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._bytes_of = _byte_level_alphabet()
        self._names: dict[int, tuple[str, list[int] | None]] = {}

    def name(self, token_id: int) -> str:
        """Return the token's text, or its bytes where they are no text by themselves."""
        return self._look_up(token_id)[0]

    def utf8(self, token_id: int) -> list[int] | None:
        """Return the token's bytes in UTF-8; None where they cannot be known."""
        return self._look_up(token_id)[1]

    def _look_up(self, token_id: int) -> tuple[str, list[int] | None]:
        # as many entries as tokens of the vocabulary, at most
        if token_id not in self._names:
            self._names[token_id] = self._find(token_id)
        return self._names[token_id]

    def _find(self, token_id: int) -> tuple[str, list[int] | None]:
        # decoders strip the space of the first token: the second of two shows what one is
        once, twice = self._decode([token_id]), self._decode([token_id, token_id])
        text = twice[len(once) :]
        if _REPLACEMENT not in text:
            return text, list(text.encode())
        found = self._bytes(self.tokenizer.convert_ids_to_tokens(token_id))
        if found is None:
            return text, None
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found), list(found)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self.tokenizer.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _bytes(self, token: str | None) -> bytes | None:
        if token is None:
            return None
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        if all(character in self._bytes_of for character in token):
            return bytes(self._bytes_of[character] for character in token)
        return None


class TextOffsets:
    """Follows a text token by token, and says where each begins."""

    def __init__(self, tokenizer: Any, start: int = 0) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._length = start

    def next(self, token_id: int) -> int:
        """Return how many characters are before the token."""
        start = self._length
        self._length += len(self._detokenizer.append(token_id))
        return start


def completion_logprobs(
    entries: Iterable[TokenLogprob],
    names: TokenNames,
    offsets: TextOffsets,
    first: int | None = None,
) -> dict[str, Any]:
    """Return the shape of ``/v1/completions``.

    Args:
        entries: of the tokens.
        names: of the tokenizer.
        offsets: of the text so far.
        first: the token before them that begins a text, and so has no probability.
    """
    tokens: list[str] = []
    logprobs: list[float | None] = []
    top: list[dict[str, float] | None] = []
    starts: list[int] = []
    if first is not None:
        tokens.append(names.name(first))
        logprobs.append(None)
        top.append(None)
        starts.append(offsets.next(first))
    for entry in entries:
        alternatives: dict[str, float] = {}
        # the best come first; the token itself is shown whether it is among them or not
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            alternatives.setdefault(names.name(token_id), _finite(logprob))
        tokens.append(names.name(entry.token_id))
        logprobs.append(_finite(entry.logprob))
        top.append(alternatives)
        starts.append(offsets.next(entry.token_id))
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": top,
        "text_offset": starts,
    }


def chat_logprobs(entries: Sequence[TokenLogprob], names: TokenNames) -> dict[str, Any]:
    """Return the shape of ``/v1/chat/completions``."""
    return {
        "content": [
            {
                **_chat_entry(entry.token_id, entry.logprob, names),
                "top_logprobs": [_chat_entry(*alternative, names) for alternative in entry.top],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def _chat_entry(token_id: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    return {
        "token": names.name(token_id),
        "logprob": _finite(logprob),
        "bytes": names.utf8(token_id),
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character that byte-level tokenizers write bytes with: a printable one stands for itself.

    The table is GPT-2's: what is not printable is numbered through from 256.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
