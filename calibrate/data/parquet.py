"""Read local parquet files.

Through ``pyarrow``, on which ``datasets`` stands: the streaming reader of ``datasets`` reports each
load to a server, sleeps five seconds at the end and fails on a table without rows (seen with 5.2).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from fp8kv.calibrate.data.files import Row
from fp8kv.recipes.errors import DataError


def shuffled_parquet(path: Path, seed: int) -> Iterator[Row]:
    """Yield the rows of a parquet file in the order that ``seed`` gives to a list of as many.

    The table is read whole in arrow's compact form, and each row becomes Python objects only when
    it is asked for.

    Raises:
        DataError: ``pyarrow`` is not installed, or the file cannot be read.
    """
    try:
        # Imported here, because no other kind of file needs it.
        import pyarrow.parquet  # type: ignore[import-untyped]  # noqa: PLC0415
    except ImportError:
        raise DataError(
            f"reading {path} needs the package 'pyarrow'; install it (pip install pyarrow) or "
            "convert the file to jsonl"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"cannot read {path} ({reason}); check that the file is complete, or convert it to "
            "jsonl"
        ) from None
    order = list(range(table.num_rows))
    random.Random(seed).shuffle(order)
    for index in order:
        (fields,) = table.slice(index, 1).to_pylist()
        yield Row(f"{path} row {index + 1}", fields)
