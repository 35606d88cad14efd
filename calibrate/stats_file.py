"""The file ``kv-stats.safetensors``: statistics on disk.

A safetensors file whose metadata entry ``fp8kv`` holds JSON: schema, provenance and the list of layers. Tensors
are called ``<layer index>.<stream>.<field>``. Counts are stored as int32 where they fit. See ``docs/formats.md``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fp8kv.calibrate.folds import NUM_FOLDS
from fp8kv.calibrate.histogram import BINS_PER_OCTAVE, FIRST_EXPONENT, LAST_EXPONENT
from fp8kv.calibrate.statistics import (
    KVStatistics,
    LayerStatistics,
    Provenance,
    StreamStatistics,
    absmax_by_layer,
)
from fp8kv.recipes.errors import OutputError, StatisticsError

FILE_NAME = "kv-stats.safetensors"
SCHEMA = 1

_HISTOGRAM = {
    "bins_per_octave": BINS_PER_OCTAVE,
    "first_exponent": FIRST_EXPONENT,
    "last_exponent": LAST_EXPONENT,
}
_COUNTS = ("histogram", "zeros", "nonfinite", "first_histogram")
_MAXIMA = ("absmax", "channel_absmax", "first_absmax", "pair_norm")


def encode_statistics(stats: KVStatistics, extra: Mapping[str, Any] | None = None) -> bytes:
    """Return the file's bytes; :func:`load_statistics` reads them back.

    Args:
        stats: what to store.
        extra: JSON-serialisable values to keep beside it (used for resuming), returned by :func:`load_extra`.
    """
    header = {
        "schema": SCHEMA,
        "provenance": asdict(stats.provenance),
        "histogram": _HISTOGRAM,
        "folds": NUM_FOLDS,
        "layers": [
            {
                "index": layer.index,
                "name": layer.name,
                "streams": {name: {"bfloat16": s.bfloat16} for name, s in layer.streams.items()},
            }
            for layer in stats.layers
        ],
        "extra": dict(extra or {}),
    }
    tensors: dict[str, Tensor] = {"tokens": stats.tokens, "samples": stats.samples}
    for layer in stats.layers:
        for stream_name, stream in layer.streams.items():
            for field in (*_COUNTS, *_MAXIMA):
                value = getattr(stream, field)
                if value is not None:
                    key = f"{layer.index}.{stream_name}.{field}"
                    tensors[key] = _narrow(value) if field in _COUNTS else value.contiguous()
    return save(tensors, metadata={"fp8kv": json.dumps(header)})


def save_statistics(
    stats: KVStatistics, path: Path, extra: Mapping[str, Any] | None = None
) -> None:
    """Write the statistics to ``path``: beside it first, then renamed over it.

    Raises:
        OutputError: the file cannot be written, with the operating system's reason.
    """
    data = encode_statistics(stats, extra)
    # not tempfile, whose files nobody but their owner may read
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def load_statistics(path: Path) -> KVStatistics:
    """Read a statistics file.

    Raises:
        StatisticsError: the file is missing, is not a statistics file, is damaged, or is of another schema.
    """
    header, tensors = _read(path)
    try:
        layers = tuple(
            LayerStatistics(
                index=int(entry["index"]),
                name=str(entry["name"]),
                streams={
                    str(name): _read_stream(
                        tensors, f"{entry['index']}.{name}", bool(facts["bfloat16"])
                    )
                    for name, facts in entry["streams"].items()
                },
            )
            for entry in header["layers"]
        )
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in header["provenance"].items()
        }
        provenance = Provenance(**fields)
        return KVStatistics(
            provenance=provenance,
            layers=layers,
            tokens=tensors["tokens"],
            samples=tensors["samples"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StatisticsError(f"{path} is damaged: {error!r}") from error


def read_absmax(path: Path) -> dict[str, tuple[float, float]]:
    """Return :func:`~fp8kv.calibrate.statistics.absmax_by_layer` of a statistics file, as ``validate`` asks for it.

    Raises:
        StatisticsError: as :func:`load_statistics`.
    """
    return absmax_by_layer(load_statistics(path))


def load_extra(path: Path) -> dict[str, Any]:
    """Return the ``extra`` values that were stored with the statistics."""
    header, _ = _read(path)
    return dict(header.get("extra", {}))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise StatisticsError(f"{path} does not exist or is not a file; name a {FILE_NAME}")
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StatisticsError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        header = json.loads(metadata["fp8kv"])
        schema, histogram, folds = header["schema"], header["histogram"], header["folds"]
    except (KeyError, ValueError, TypeError):
        raise StatisticsError(
            f"{path} is a safetensors file, but not one that fp8kv calibrate wrote"
        ) from None
    if (schema, histogram, folds) != (SCHEMA, _HISTOGRAM, NUM_FOLDS):
        raise StatisticsError(
            f"{path} has schema {schema}, histogram {histogram} and {folds} folds; this fp8kv reads schema "
            f"{SCHEMA}, histogram {_HISTOGRAM} and {NUM_FOLDS} folds: measure again or use the version that wrote it"
        )
    return header, tensors


def _read_stream(tensors: Mapping[str, Tensor], prefix: str, bfloat16: bool) -> StreamStatistics:
    counts = {field: tensors[f"{prefix}.{field}"].to(torch.int64) for field in _COUNTS}
    maxima = {field: tensors[f"{prefix}.{field}"] for field in _MAXIMA if field != "pair_norm"}
    return StreamStatistics(
        **counts, **maxima, pair_norm=tensors.get(f"{prefix}.pair_norm"), bfloat16=bfloat16
    )


def _narrow(counts: Tensor) -> Tensor:
    largest = int(counts.max()) if counts.numel() else 0
    return counts.to(torch.int32 if largest < 2**31 else torch.int64).contiguous()
