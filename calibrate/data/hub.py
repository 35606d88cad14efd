"""Stream the rows of datasets on the Hugging Face hub, through the ``datasets`` package.

Nothing is downloaded whole: rows are streamed through a seeded shuffle buffer, so of a set of a
terabyte only the rows up to the buffer and the samples are read. The price is that the draw prefers
the beginning of each shard; the shards themselves are shuffled too.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from fp8kv.calibrate.data.files import Row
from fp8kv.calibrate.data.sources import Source
from fp8kv.recipes.errors import DataError

SHUFFLE_BUFFER_ROWS = 10_000

_REASON_CHARS = 300


def stream_hub(source: Source, seed: int) -> Iterator[Row]:
    """Yield the rows of a hub dataset in a seeded order.

    Raises:
        DataError: ``datasets`` is not installed, or it cannot load or read the dataset (no network,
            no such dataset, config or split).
    """
    datasets = _import_datasets(source)
    try:
        stream = datasets.load_dataset(
            path=source.dataset, name=source.config, split=source.split, streaming=True
        )
        for fields in stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER_ROWS):
            yield Row(f"a row of dataset {source.dataset}", fields)
    # The package lets through the errors of half a dozen others (HTTP clients, arrow, file
    # systems), which share no base. Only its own code runs inside this block.
    except Exception as error:
        raise _unreadable(source, error) from error


def load_hub_rows(source: Source) -> list[dict[str, Any]]:
    """Return all rows of a hub dataset, in its own order; for sets that are small and whose order matters.

    Raises:
        DataError: as :func:`stream_hub`.
    """
    datasets = _import_datasets(source)
    try:
        table = datasets.load_dataset(path=source.dataset, name=source.config, split=source.split)
        return [dict(row) for row in table]
    except Exception as error:
        raise _unreadable(source, error) from error


def _import_datasets(source: Source) -> ModuleType:
    try:
        # Imported here, because local files need nothing of it.
        import datasets  # noqa: PLC0415
    except ImportError as error:
        raise DataError(
            f"reading dataset {source.dataset} from the Hugging Face hub needs the package 'datasets'; "
            "install it (pip install datasets) or give a local file"
        ) from error
    return datasets  # type: ignore[no-any-return]


def _unreadable(source: Source, error: Exception) -> DataError:
    return DataError(
        f"cannot read dataset {source.dataset} ({_one_line(error)}); no file of that name is here, so it "
        "was looked up on the Hugging Face hub: check the network, the name, "
        f"config={source.config or ''} and split={source.split}, or give a local file"
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _REASON_CHARS else text[: _REASON_CHARS - 3] + "..."
