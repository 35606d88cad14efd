"""Find what a row has to say: recognise its columns and return it as text and as chat messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fp8kv.calibrate.data.files import Row
from fp8kv.calibrate.data.sources import suggest
from fp8kv.recipes.errors import DataError

Messages = list[dict[str, Any]]

_MESSAGE_COLUMNS = ("messages", "conversations")
# In this order, so that a row with all of them reads the same in every file.
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Content:
    """What one row says, in both forms.

    Attributes:
        text: as plain text.
        messages: as a conversation, ``{role, content}`` mappings.
        is_chat: whether the row itself holds a conversation.
    """

    text: str
    messages: Messages
    is_chat: bool


def row_content(row: Row, column: str | None = None) -> Content | None:
    r"""Return what ``row`` says, or ``None`` where that is empty.

    With ``column``, that column: a string is text, a list is messages. Without it, the first of:

    - ``text``: as it is;
    - ``messages`` or ``conversations``: messages ``{role, content}``, or ``{from, value}`` as
      ShareGPT has them;
    - ``question`` and ``answer``: ``"Question: {question}\nAnswer: {answer}"``, the text that
      lm-evaluation-harness forms of GSM8K;
    - ``prompt`` and ``completion``, ``prompt`` and ``response``, or ``instruction`` and ``output``
      (an ``input`` between them counts as part of the instruction): joined by a line end.

    As a conversation, text is one user message, and a pair is a user's message and the assistant's.
    As text, messages are their contents, joined by blank lines. A missing value (null) and white
    space are empty; of a pair, one empty part is enough.

    Raises:
        DataError: no column is recognised, ``column`` is missing, or a value is not of the form
            above.
    """
    fields = row.fields
    if column is not None:
        if column not in fields:
            raise DataError(
                f"{row.where} has no column {column!r}{suggest(column, tuple(fields))}; "
                f"its columns are {_listed(fields)}"
            )
        return _chat(row, column) if isinstance(fields[column], list) else _plain(row, column)
    if "text" in fields:
        return _plain(row, "text")
    for name in _MESSAGE_COLUMNS:
        if name in fields:
            return _chat(row, name)
    if "question" in fields and "answer" in fields:
        return _pair(_text(row, "question"), _text(row, "answer"), "Question: {}\nAnswer: {}")
    for first, last in _PAIRS:
        if first in fields and last in fields:
            asked = _text(row, first)
            if first == "instruction" and "input" in fields:
                asked = "\n".join(part for part in (asked, _text(row, "input")) if part)
            return _pair(asked, _text(row, last), "{}\n{}")
    raise DataError(
        f"{row.where} has no column that is recognised, only {_listed(fields)}; name the one that "
        "holds the text or the messages with column= (as in --dataset NAME,column=COLUMN)"
    )


def _plain(row: Row, column: str) -> Content | None:
    text = _text(row, column)
    return Content(text, [{"role": "user", "content": text}], is_chat=False) if text else None


def _pair(asked: str | None, answered: str | None, form: str) -> Content | None:
    if not asked or not answered:
        return None
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return Content(form.format(asked, answered), messages, is_chat=False)


def _chat(row: Row, column: str) -> Content | None:
    value = row.fields[column]
    if not value:
        return None
    if not isinstance(value, list):
        raise _wrong_type(row, column, "a list of messages")
    messages = [_message(row, column, message) for message in value]
    texts = [_message_text(message) for message in messages]
    return Content("\n\n".join(text for text in texts if text), messages, is_chat=True)


def _text(row: Row, column: str) -> str | None:
    value = row.fields[column]
    if value is None:
        return None
    if not isinstance(value, str):
        raise _wrong_type(row, column, "text")
    return value if value.strip() else None


def _message(row: Row, column: str, message: Any) -> dict[str, Any]:
    if isinstance(message, Mapping):
        if "role" in message and "content" in message:
            # Columnar formats fill the keys that a message does not have with null; templates test
            # for presence.
            return {
                key: value
                for key, value in message.items()
                if value is not None or key in ("role", "content")
            }
        if "from" in message and "value" in message:
            role = str(message["from"])
            return {"role": _SHAREGPT_ROLES.get(role, role), "content": message["value"]}
    raise DataError(
        f"column {column!r} of {row.where} has a message that is neither {{role, content}} nor "
        f"{{from, value}}: {str(message)[:80]!r}; mend it or name another column with column="
    )


def _message_text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, list):  # parts, of which pictures and the like have no text
        content = "".join(
            str(part.get("text") or "") for part in content if isinstance(part, Mapping)
        )
    return str(content or "")


def _wrong_type(row: Row, column: str, expected: str) -> DataError:
    found = type(row.fields[column]).__name__
    return DataError(
        f"column {column!r} of {row.where} holds a {found}, not {expected}; "
        f"name another with column= (columns: {_listed(row.fields)})"
    )


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in fields) or "none"
