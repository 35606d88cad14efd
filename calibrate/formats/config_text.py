"""Edit JSON as text: change a few keys, and leave every other byte as it is.

A checkpoint's ``config.json`` holds keys that no library knows, in an order and an indentation that people diff.
Parsing and dumping it again would lose that, so the edits here find the place in the text and change only it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp8kv.recipes.errors import CheckpointError

_WHITESPACE = " \t\r\n"
_DECODER = json.JSONDecoder()

Edit = tuple[tuple[str, ...], Any]


def set_json_key(text: str, path: Sequence[str], value: Any) -> str:
    """Return ``text`` with the value at ``path`` set to ``value`` and all other characters unchanged.

    An existing value is replaced where it stands. A new key goes behind the last key of its object, in that
    object's own indentation and line ends. Missing objects on the way are created. An equal value leaves the
    text as it is.

    Args:
        text: a JSON document whose root is an object.
        path: the keys from the root, at least one.
        value: anything that JSON can hold.

    Raises:
        CheckpointError: ``text`` is not a JSON object, or a key on the way holds something else than an object.
    """
    return set_json_keys(text, [(tuple(path), value)])


def set_json_keys(text: str, edits: Sequence[Edit]) -> str:
    """Return ``text`` with all ``edits`` made, in order; see :func:`set_json_key`.

    Edits that stand together and share their parent object cost one scan of it, so thousands of additions to a
    weight map are as cheap as one.

    Raises:
        CheckpointError: as :func:`set_json_key`.
    """
    _check_root(text)
    start = 0
    while start < len(edits):
        parent = edits[start][0][:-1]
        stop = start
        members: dict[str, Any] = {}
        while stop < len(edits) and edits[stop][0][:-1] == parent:
            path, value = edits[stop]
            if not path:
                raise CheckpointError("an edit of a JSON document needs at least one key")
            members[path[-1]] = value
            stop += 1
        text = _set_members(text, parent, members)
        start = stop
    return text


def nested_edits(location: Sequence[str], values: Mapping[str, Any]) -> list[Edit]:
    """Return one edit per item of ``values``, each below the key path ``location``."""
    return [((*location, key), value) for key, value in values.items()]


@dataclass(frozen=True)
class _Member:
    """One ``"key": value`` of an object; positions are offsets into the text."""

    key: str
    key_start: int
    key_end: int
    value_start: int
    value_end: int


@dataclass(frozen=True)
class _Object:
    """One object of the document: ``open`` is the offset of its brace, ``close`` that of the closing one."""

    open: int
    close: int
    members: tuple[_Member, ...]

    def find(self, key: str) -> _Member | None:
        # A repeated key: JSON readers take the last one, so that is the one to change.
        return next((member for member in reversed(self.members) if member.key == key), None)


def _set_members(text: str, parent: tuple[str, ...], members: Mapping[str, Any]) -> str:
    scanned = _scan(text, _skip(text, 0))
    for depth, key in enumerate(parent):
        member = scanned.find(key)
        if member is None:
            # Create the missing objects as one new member of the deepest object that is there.
            value: Any = dict(members)
            for missing in reversed(parent[depth + 1 :]):
                value = {missing: value}
            members = {key: value}
            break
        if text[member.value_start] != "{":
            path = ".".join(parent[: depth + 1])
            raise CheckpointError(
                f"the JSON key {path} is not an object, so nothing can be set in it"
            )
        scanned = _scan(text, member.value_start)
    return _apply(text, scanned, members)


def _apply(text: str, scanned: _Object, members: Mapping[str, Any]) -> str:
    style = _Style.of(text, scanned)
    replacements: list[tuple[int, int, str]] = []
    added: list[str] = []
    for key, value in members.items():
        member = scanned.find(key)
        if member is None:
            added.append(json.dumps(key) + style.colon + style.dump(value))
        elif not _equal(json.loads(text[member.value_start : member.value_end]), value):
            replacements.append((member.value_start, member.value_end, style.dump(value)))
    if added:
        joined = ("," + style.before).join(added)
        if scanned.members:
            end = scanned.members[-1].value_end
            replacements.append((end, end, "," + style.before + joined))
        else:
            replacements.append(
                (scanned.open + 1, scanned.close, style.before + joined + style.after)
            )
    for begin, end, new in sorted(replacements, reverse=True):
        text = text[:begin] + new + text[end:]
    return text


@dataclass(frozen=True)
class _Style:
    """How an object is laid out.

    Attributes:
        before: white space between a comma and the next key.
        after: white space before the closing brace of an object that was empty.
        colon: the colon with the white space around it.
        unit: one step of indentation; empty for documents on one line.
    """

    before: str
    after: str
    colon: str
    unit: str

    @classmethod
    def of(cls, text: str, scanned: _Object) -> _Style:
        root = _scan(text, _skip(text, 0))
        # The root's first key shows the line ends and the step of indentation of the document.
        first = text[root.open + 1 : root.members[0].key_start] if root.members else "\n  "
        unit = first.rpartition("\n")[2] if "\n" in first else ""
        if scanned.members:
            colon = _colon(text, scanned.members[-1])
            before = _before_last_key(text, scanned)
            if len(scanned.members) == 1 and "\n" not in before:
                before = " " if colon.endswith(" ") else ""
            return cls(before, "", colon, unit if "\n" in before else "")
        colon = _colon(text, root.members[0]) if root.members else ": "
        if not unit:
            return cls("", "", colon, "")
        newline = "\r\n" if "\r\n" in first else "\n"
        line = text[: scanned.open].rpartition("\n")[2]
        indent = line[: len(line) - len(line.lstrip(" \t"))]
        return cls(newline + indent + unit, newline + indent, colon, unit)

    def dump(self, value: Any) -> str:
        if not self.unit:
            comma = ", " if self.colon.endswith(" ") else ","
            return json.dumps(value, separators=(comma, self.colon))
        # json.dumps indents from column 0; the lines after the first belong below this member.
        newline = "\r\n" if "\r\n" in self.before else "\n"
        line_break = newline + self.before.rpartition("\n")[2]
        text = json.dumps(value, indent=self.unit, separators=(",", self.colon))
        return text.replace("\n", line_break)


def _colon(text: str, member: _Member) -> str:
    between = text[member.key_end : member.value_start]
    return ": " if "\n" in between else between


def _before_last_key(text: str, scanned: _Object) -> str:
    last = scanned.members[-1]
    if len(scanned.members) == 1:
        return text[scanned.open + 1 : last.key_start]
    comma = text.index(",", scanned.members[-2].value_end)
    return text[comma + 1 : last.key_start]


def _check_root(text: str) -> None:
    try:
        root = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"the document is not JSON: {error}") from None
    if not isinstance(root, dict):
        raise CheckpointError("the document is JSON, but its root is not an object")


def _scan(text: str, open_brace: int) -> _Object:
    """Find the members of the object whose brace stands at ``open_brace``; the text is known to be JSON."""
    members: list[_Member] = []
    position = _skip(text, open_brace + 1)
    while text[position] != "}":
        key, key_end = _DECODER.raw_decode(text, position)
        value_start = _skip(text, _skip(text, key_end) + 1)
        value_end = _DECODER.raw_decode(text, value_start)[1]
        members.append(_Member(key, position, key_end, value_start, value_end))
        position = _skip(text, value_end)
        if text[position] == ",":
            position = _skip(text, position + 1)
    return _Object(open_brace, position, tuple(members))


def _skip(text: str, position: int) -> int:
    while text[position] in _WHITESPACE:
        position += 1
    return position


def _equal(old: Any, new: Any) -> bool:
    # Through text, because 1, 1.0 and true are equal in Python and different in JSON.
    return json.dumps(old) == json.dumps(new)
