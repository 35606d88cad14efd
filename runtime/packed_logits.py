"""Logits at chosen positions of given texts, packed: many short texts share a forward pass, a long one takes several.

The texts run through the same pages, quantised or not, as in generation, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.batch import Batch, make_batch
from fp8kv.runtime.paging import OutOfPages, PageAllocator

LEAST_ROWS = 1024
_ELEMENTS = 1 << 27


class LogitsRunner(Protocol):
    """A model over a paged cache."""

    def logits_at(self, batch: Batch, rows: Tensor) -> Tensor:
        """Return the logits of the new tokens ``rows [wanted]``, ``[wanted, vocabulary]``."""
        ...


def rows_at_once(vocab_size: int) -> int:
    """Return how many rows of logits are held at one time: 2^27 numbers, but no fewer than 1024 rows."""
    return max(LEAST_ROWS, _ELEMENTS // vocab_size)


def packed_logits(
    runner: LogitsRunner,
    allocator: PageAllocator,
    texts: Iterable[tuple[Sequence[int], int]],
    *,
    max_tokens: int,
    max_rows: int,
    device: torch.device | str,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the logits of the wanted tokens, text by text, each text from its first wanted token to its last.

    A text that is cut by the end of a forward pass comes in several pieces. Pages are taken as the texts' turn comes
    and freed behind them; whoever closes the iterator frees them at once.

    Args:
        runner: of the model.
        allocator: of its pages.
        texts: of each the tokens that enter the model, and the first of them whose logits are wanted.
        max_tokens: of a forward pass.
        max_rows: rows of logits of a forward pass.
        device: where the model runs.

    Yields:
        The number of a text and ``[rows, vocabulary]`` in the model's dtype.

    Raises:
        RequestError: a text needs more pages than are free.
    """
    packer = _Packer(allocator, texts, max_tokens, max_rows)
    try:
        while parts := packer.fill():
            batch = make_batch(
                [(part.token_ids, part.start, part.text.pages) for part in parts],
                allocator.page_size,
                device,
            )
            ends = [0]
            for part in parts:
                ends.append(ends[-1] + len(part.token_ids))
            rows = chain.from_iterable(
                range(end - part.num_rows, end) for part, end in zip(parts, ends[1:], strict=True)
            )
            counts = [part.num_rows for part in parts]
            # of a chunk of which nothing is wanted one row is computed: a model without any has no logits
            wanted = torch.tensor(list(rows) or [0])
            logits = runner.logits_at(batch, wanted.to(device))
            packer.advance(parts)
            for part, own in zip(parts, torch.split(logits[: sum(counts)], counts), strict=True):
                if part.num_rows:
                    yield part.text.number, own
    finally:
        packer.close()


@dataclass(eq=False)
class _Text:
    """A text whose turn has come."""

    number: int
    token_ids: Sequence[int]
    first: int
    pages: list[int]
    num_done: int = 0


@dataclass(frozen=True)
class _Part:
    """What a forward pass computes of a text."""

    text: _Text
    num_tokens: int

    @property
    def start(self) -> int:
        return self.text.num_done

    @property
    def token_ids(self) -> Sequence[int]:
        return self.text.token_ids[self.start : self.start + self.num_tokens]

    @property
    def num_rows(self) -> int:
        """How many of the last tokens' logits are wanted."""
        return max(0, self.start + self.num_tokens - max(self.start, self.text.first))


class _Packer:
    """Fills forward passes with texts, in order: only the last of a pass can be cut."""

    def __init__(
        self,
        allocator: PageAllocator,
        texts: Iterable[tuple[Sequence[int], int]],
        max_tokens: int,
        max_rows: int,
    ) -> None:
        self._allocator = allocator
        self._texts = ((number, *text) for number, text in enumerate(texts) if text[0])
        self._next = next(self._texts, None)
        self._max_tokens = max_tokens
        self._max_rows = max_rows
        self._open: list[_Text] = []

    def fill(self) -> list[_Part]:
        """Return the next pass, empty after the last."""
        parts: list[_Part] = []
        tokens, rows = self._max_tokens, self._max_rows
        for text in self._turns():
            remaining = len(text.token_ids) - text.num_done
            unwanted = max(0, text.first - text.num_done)
            size = min(remaining, tokens, unwanted + rows)
            if size:
                parts.append(_Part(text, size))
                tokens -= size
                rows -= parts[-1].num_rows
            if size < remaining or not tokens:
                break
        return parts

    def advance(self, parts: Sequence[_Part]) -> None:
        """Note that a pass is launched; texts that are done give their pages back, which later passes write."""
        for part in parts:
            part.text.num_done += part.num_tokens
        for text in [text for text in self._open if text.num_done == len(text.token_ids)]:
            self._open.remove(text)
            self._allocator.free(text.pages)

    def close(self) -> None:
        """Give all pages back."""
        while self._open:
            self._allocator.free(self._open.pop().pages)

    def _turns(self) -> Iterator[_Text]:
        yield from list(self._open)
        while self._next is not None:
            number, token_ids, first = self._next
            try:
                pages = self._allocator.allocate(-(-len(token_ids) // self._allocator.page_size))
            except OutOfPages as error:
                if self._open:  # they will be freed
                    return
                raise RequestError(
                    f"{len(token_ids)} tokens cannot be scored beside what is running: {error}"
                ) from None
            self._open.append(_Text(number, token_ids, first, pages))
            self._next = next(self._texts, None)
            yield self._open[-1]
