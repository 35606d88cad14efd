"""What transformers reports on a load: kept from the log, and asked for the one thing that went wrong."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def load_report() -> Iterator[list[str]]:
    """Keep transformers' report on a load, tables and tracebacks, from the log, and give it as text."""
    text: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        text.append(record.getMessage())
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield text
    finally:
        logger.removeFilter(keep)


def conversion_failure(report: list[str]) -> str | None:
    """Name the weight that transformers could not put together from several tensors."""
    match = re.search(r"tensors destined for (\S+)\.\s", "\n".join(report))
    if match is None:
        return None
    return f"the tensors that make up {match[1]} do not fit together or are not all there; is the download complete?"


def is_out_of_memory(report: list[str]) -> bool:
    """Tell whether merging tensors failed for want of memory, which transformers reports as any other failure."""
    return any(torch.OutOfMemoryError.__name__ in text for text in report)
