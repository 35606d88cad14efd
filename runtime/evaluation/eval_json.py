"""Build frozen dataclasses from their JSON form, by their annotations, refusing every deviation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fp8kv.recipes.errors import EvaluationError

_Record = TypeVar("_Record")


def decode(kind: type[_Record], value: Any, where: str) -> _Record:
    """Return the ``kind`` whose ``dataclasses.asdict``, through JSON or not, is ``value``.

    Fields may be text, numbers, truth values, such dataclasses, tuples and mappings from text of one of these, and
    any of them or None.

    Args:
        kind: a dataclass.
        value: its JSON form.
        where: how messages call it.

    Raises:
        EvaluationError: a key is missing or unknown, or a value is of another type.
    """
    record: _Record = _decode(kind, value, where)
    return record


def _decode(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _decode_record(kind, _mapping(value, where), where)
    if get_origin(kind) is Mapping:
        _, entry_kind = get_args(kind)
        entries = _mapping(value, where)
        return {key: _decode(entry_kind, entry, f"{where}.{key}") for key, entry in entries.items()}
    if get_origin(kind) is tuple:
        entry_kind, _ = get_args(kind)
        if not isinstance(value, list | tuple):
            raise EvaluationError(f"{where} must be a JSON array, not {value!r}")
        return tuple(_decode(entry_kind, entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if isinstance(kind, UnionType):
        present, _ = get_args(kind)
        return None if value is None else _decode(present, value, where)
    # JSON writers may drop the fraction of a whole number. A bool is an int to Python, not to us.
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise EvaluationError(f"{where} must be {kind.__name__}, not {value!r}")
    return value


def _decode_record(kind: Any, value: Mapping[str, Any], where: str) -> Any:
    kinds = get_type_hints(kind)
    for key in kinds:
        if key not in value:
            raise EvaluationError(f"{where} lacks {key!r}; the report is incomplete")
    for key in value:
        if key not in kinds:
            raise EvaluationError(f"{where} has an unknown key {key!r}; known: {', '.join(kinds)}")
    return kind(**{key: _decode(kinds[key], value[key], f"{where}.{key}") for key in kinds})


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise EvaluationError(f"{where} must be a JSON object, not {value!r}")
    return value
