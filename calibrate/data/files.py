"""Read local datasets: rows of jsonl, json and csv files, and the text of txt files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fp8kv.recipes.errors import DataError

# Enough for the tokenizer's cost per call to vanish, little enough that its lists stay small.
_TEXT_BLOCK_CHARS = 1 << 20


@dataclass(frozen=True)
class Row:
    """One row of a dataset.

    Attributes:
        where: the row's place, as an error message names it, e.g. ``train.jsonl line 17``.
        fields: value by column name.
    """

    where: str
    fields: Mapping[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Read all rows of a ``.jsonl``, ``.json`` or ``.csv`` file.

    A json file holds a list of objects, or an object whose ``data`` is one. The whole file is
    parsed, so that a broken line is found whatever the seed draws.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or holds something else than rows.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    read = readers[path.suffix.lower()]
    with _opened(path) as file:
        return _guarded_list(path, read(path, file))


def read_text_blocks(path: Path) -> Iterator[str]:
    """Yield the text of a ``.txt`` file in blocks of whole lines, about a million characters each.

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    with _opened(path) as file:
        try:
            while lines := file.readlines(_TEXT_BLOCK_CHARS):
                yield "".join(lines)
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(path, error) from None


def _opened(path: Path) -> TextIO:
    try:
        # Spreadsheets write a byte-order mark, which would become part of the first column's name
        # (hence utf-8-sig), and csv must see line ends inside quoted fields as they are.
        newline = "" if path.suffix.lower() == ".csv" else None
        return path.open(encoding="utf-8-sig", newline=newline)
    except OSError as error:
        raise _unreadable(path, error) from None


def _guarded_list(path: Path, rows: Iterator[Row]) -> list[Row]:
    try:
        return list(rows)
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _read_jsonl(path: Path, file: TextIO) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        where = f"{path} line {number}"
        if line.strip():
            yield _row(where, _parse_json(where, line))


def _read_json(path: Path, file: TextIO) -> Iterator[Row]:
    content = _parse_json(str(path), file.read())
    if isinstance(content, dict):
        content = content.get("data")
    if not isinstance(content, list):
        raise DataError(
            f"{path} holds neither a list of rows nor an object whose 'data' is one; "
            "convert it to jsonl, one object a line"
        )
    for number, value in enumerate(content, start=1):
        yield _row(f"{path} row {number}", value)


def _read_csv(path: Path, file: TextIO) -> Iterator[Row]:
    reader = csv.DictReader(file, strict=True)
    try:
        for fields in reader:
            where = f"{path} line {reader.line_num}"
            if None in fields:
                raise DataError(f"{where} has more fields than the header; quote its commas")
            yield Row(where, fields)
    except csv.Error as error:
        line = reader.reader.line_num  # the DictReader's own stands before the broken row
        raise DataError(
            f"{path} line {line} is not valid csv ({error}); mend it or convert the file to jsonl"
        ) from None


def _parse_json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is not valid JSON ({error}); mend or remove it, or check that the file is "
            "complete"
        ) from None


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"{where} is a JSON {type(value).__name__}, not an object; "
            'write it as {"text": ...} or another row with named columns'
        )
    return Row(where, value)


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return DataError(f"cannot read {path}: {reason}; check the file and its permissions")
