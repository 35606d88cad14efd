"""The paged KV cache: slots, pages and the two orders in memory. Needs torch alone.

A cache of grouped-query attention has the logical shape ``[pages, page_size, kv_heads, head_dim]``, whatever its
order in memory: NHD is the contiguous one, HND keeps a head's tokens of one page together and is a transposed view.
A cache of multi-head latent attention has the shape ``[pages, page_size, latent_dim + rope_dim]``; V is its first
``latent_dim`` columns. A token's place is its *slot*, ``page * page_size + offset``. A sequence's pages are listed in
its row of the page table; entries beyond the last used page have no meaning. A negative slot is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MAX_PAGE_SIZE = 256


@dataclass(frozen=True)
class PagedLayout:
    """How one cache tensor is cut into pages.

    Attributes:
        page_size: tokens of a page, a power of two up to 256.
        order: ``"NHD"`` keeps the heads of a token together, ``"HND"`` the tokens of a head.
    """

    page_size: int
    order: Literal["NHD", "HND"] = "NHD"

    def __post_init__(self) -> None:
        """Refuse a page size that the kernels cannot address by shifting.

        Raises:
            ValueError: the page size is not a power of two between 1 and 256, or the order is unknown.
        """
        if not is_page_size(self.page_size):
            raise ValueError(f"page_size is {self.page_size}, but must be a power of two up to 256")
        if self.order not in ("NHD", "HND"):
            raise ValueError(f"order is {self.order!r}, but must be 'NHD' or 'HND'")

    def pages_for(self, tokens: int) -> int:
        """Return how many pages hold ``tokens`` tokens."""
        return -(-tokens // self.page_size)

    def empty(
        self, pages: int, kv_heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return an uninitialised cache of logical shape [pages, page_size, kv_heads, head_dim]."""
        if self.order == "NHD":
            return torch.empty(
                pages, self.page_size, kv_heads, head_dim, dtype=dtype, device=device
            )
        shape = (pages, kv_heads, self.page_size, head_dim)
        return torch.empty(shape, dtype=dtype, device=device).transpose(1, 2)


def is_page_size(page_size: int) -> bool:
    """Say whether the kernels take pages of this many tokens."""
    return 1 <= page_size <= MAX_PAGE_SIZE and page_size & (page_size - 1) == 0


def slots_of(page_table_row: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Return the slots of a sequence's tokens.

    Args:
        page_table_row: [max_pages], int32 or int64, the pages of one sequence in order.
        positions: [tokens], int32 or int64, positions in the sequence.
        page_size: tokens of a page.

    Returns:
        [tokens], int64.
    """
    positions = positions.long()
    pages = page_table_row[positions // page_size].long()
    return pages * page_size + positions % page_size


def kernel_view(cache: Tensor) -> Tensor:
    """Return a cache as kernels are given it: bytes for FP8 codes, an unquantised one as it is."""
    return cache.view(torch.uint8) if cache.element_size() == 1 else cache


def gather_tokens(cache: Tensor, page_table_row: Tensor, length: int) -> Tensor:
    """Return the first ``length`` tokens of a sequence, [length, ...], in the cache's dtype.

    The plain-torch way to what a kernel reads through the page table; the references are built on it.

    Args:
        cache: [pages, page_size, ...].
        page_table_row: [max_pages], the pages of one sequence in order.
        length: tokens of the sequence.
    """
    page_size = cache.shape[1]
    pages = page_table_row[: -(-length // page_size)].long()
    return cache[pages].flatten(0, 1)[:length]
