"""Read the header of a safetensors file: names, dtypes, shapes and byte ranges, never the weights.

A file is 8 bytes (length of the header, little-endian), the header (JSON) and the data section. The header gives
each tensor a byte range inside the data section; together the ranges fill it without holes or overlaps:

    | length: 8 | header: length bytes | tensor | tensor | ... |
                                       ^ data_start            ^ file_size

The reader trusts nothing: a truncated download, a corrupt header or a hostile one ends in a
:class:`~fp8kv.recipes.errors.CheckpointError` of one sentence, and no more memory is taken than the header needs.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8kv.calibrate.formats.json_text import parse_object, show
from fp8kv.recipes.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation

DTYPE_BITS: Mapping[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}

_LENGTH_BYTES = 8
_MAX_COUNT = 2**63 - 1
_LFS_MARK = b"version "  # "version https://git-lfs.github.com/spec/v1"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file.

    Attributes:
        dtype: as in the header, e.g. ``BF16``, ``F32``, ``F8_E4M3``, ``I32``.
        shape: the dimensions; empty for a scalar.
        start: first byte, counted from the start of the data section.
        end: one past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What the header of a safetensors file says.

    Attributes:
        path: the file.
        metadata: the free-form ``__metadata__`` of the file; empty if it has none.
        tensors: tensor name -> entry, in the order of the header.
        data_start: offset of the data section in the file, in bytes.
        file_size: size of the file, in bytes.
        sha256: hash of the raw header, its 8 length bytes included.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    data_start: int
    file_size: int
    sha256: str


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of the safetensors file at ``path``.

    Peak memory is a small multiple of the header's own size, which is bounded by :data:`MAX_HEADER_BYTES`.

    Raises:
        CheckpointError: the file is missing, truncated, or breaks the format in any way.
    """
    raw, file_size = _read_raw_header(path)
    data_start = len(raw)
    content = parse_object(
        raw[_LENGTH_BYTES:], f"the safetensors header of {path}", unique_keys=True
    )
    metadata = _metadata(path, content.pop("__metadata__", {}))
    tensors = {name: _entry(path, name, fields) for name, fields in content.items()}
    data_size = _check_layout(path, tensors)
    _check_size(path, data_start + data_size, file_size)
    return SafetensorsHeader(
        path=path,
        metadata=metadata,
        tensors=tensors,
        data_start=data_start,
        file_size=file_size,
        sha256=hashlib.sha256(raw).hexdigest(),
    )


def _read_raw_header(path: Path) -> tuple[bytes, int]:
    """Return the length bytes and the header together, and the file's size."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file; a safetensors file belongs there")
        file_size = status.st_size
        with path.open("rb") as file:
            prefix = file.read(_LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            _check_length(path, prefix, length, file_size)
            header = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}; check the file and its permissions"
        ) from None
    if len(header) != length:
        raise CheckpointError(f"{path} shrank while it was read; try again when it is at rest")
    return prefix + header, file_size


def _check_length(path: Path, prefix: bytes, length: int, file_size: int) -> None:
    if len(prefix) < _LENGTH_BYTES:
        raise CheckpointError(
            f"{path} is too short to be a safetensors file: {file_size} bytes; download it again"
        )
    if prefix == _LFS_MARK:
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in the checkpoint"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is no safetensors file: its header claims {length} bytes "
            f"(limit {MAX_HEADER_BYTES}); download it again"
        )
    if length > file_size - _LENGTH_BYTES:
        missing = length - (file_size - _LENGTH_BYTES)
        raise CheckpointError(
            f"{path} is truncated: {missing} bytes of its {length}-byte header are missing; "
            "download it again"
        )


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise CheckpointError(
            f"the __metadata__ of {path} is {show(value)}, not an object of strings; "
            "download the file again"
        )
    return value


def _entry(path: Path, name: str, fields: Any) -> TensorEntry:
    where = f"tensor {show(name)} of {path}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where} is described by {show(fields)}, not by dtype, shape and data_offsets; "
            "download the file again"
        )
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{where} has the unknown dtype {show(dtype)}; known are {', '.join(DTYPE_BITS)}"
        )
    shape = _counts(where, "shape", fields["shape"])
    offsets = _counts(where, "data_offsets", fields["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where} has the data_offsets {show(list(offsets))}, which are no byte range; "
            "download the file again"
        )
    start, end = offsets
    num_bits = DTYPE_BITS[dtype]
    for size in shape:
        num_bits *= size
        if num_bits > _MAX_COUNT:
            raise CheckpointError(
                f"{where} has the shape {show(list(shape))}, larger than any file can hold; "
                "download the file again"
            )
    if num_bits % 8 or num_bits // 8 != end - start:
        raise CheckpointError(
            f"{where} needs {num_bits / 8:g} bytes for {dtype} {show(list(shape))} but its byte "
            f"range has {end - start}; download the file again"
        )
    return TensorEntry(dtype, shape, start, end)


def _counts(where: str, key: str, value: Any) -> tuple[int, ...]:
    # type() and not isinstance(): True is an int to isinstance.
    if not isinstance(value, list) or not all(
        type(item) is int and 0 <= item <= _MAX_COUNT for item in value
    ):
        raise CheckpointError(
            f"{where} has the {key} {show(value)}, not a list of non-negative integers; "
            "download the file again"
        )
    return tuple(value)


def _check_layout(path: Path, tensors: Mapping[str, TensorEntry]) -> int:
    """Refuse overlaps and holes; return the size of the data section in bytes."""
    position, before = 0, ""
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < position:
            raise CheckpointError(
                f"tensors {show(before)} and {show(name)} of {path} overlap; download the file again"
            )
        if entry.start > position:
            raise CheckpointError(
                f"{path} has a hole of {entry.start - position} bytes before tensor {show(name)}; "
                "download the file again"
            )
        position, before = entry.end, name
    return position


def _check_size(path: Path, expected: int, file_size: int) -> None:
    if file_size < expected:
        raise CheckpointError(
            f"{path} is truncated: {expected - file_size} of {expected} bytes are missing; "
            "download it again"
        )
    if file_size > expected:
        raise CheckpointError(
            f"{path} has {file_size - expected} bytes after its last tensor; download it again"
        )
