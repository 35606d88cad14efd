"""Parse JSON objects that came from outside, with one sentence for whatever is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fp8kv.recipes.errors import CheckpointError


def parse_object(raw: bytes, where: str, *, unique_keys: bool = False) -> dict[str, Any]:
    """Parse ``raw`` as one JSON object.

    Args:
        raw: the bytes, UTF-8.
        where: how to name the source in an error, e.g. the file's path.
        unique_keys: refuse an object that has a key twice. Readers differ in which one they take.

    Raises:
        CheckpointError: the bytes are not UTF-8, not JSON, not an object, or a key appears twice.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique if unique_keys else None)
    except _DuplicateKeyError as error:
        raise CheckpointError(
            f"{where} has the key {show(error.key)} twice; its writer is broken, write it again"
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where} is not UTF-8 (byte {error.start}); download it again"
        ) from None
    except RecursionError:
        raise CheckpointError(
            f"{where} nests too deeply to be JSON of a checkpoint; download it again"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where} holds a JSON {type(value).__name__} where an object belongs; "
            "point to a model checkpoint"
        )
    return value


def read_object(path: Path, *, unique_keys: bool = False) -> tuple[dict[str, Any], str]:
    """Read the file at ``path`` as one JSON object.

    Returns:
        The object, and the file's text as it stands.

    Raises:
        CheckpointError: the file cannot be read, or :func:`parse_object` refuses it.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}; check the file and its permissions"
        ) from None
    return parse_object(raw, str(path), unique_keys=unique_keys), raw.decode("utf-8")


def show(value: object, limit: int = 80) -> str:
    """Return ``repr(value)``, cut to ``limit`` characters: a hostile file must not flood an error message."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class _DuplicateKeyError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(key)
        result[key] = value
    return result
