"""One forward pass over the new tokens of several sequences, packed in a row: what the model and the backends read.

Lengths, slots and the page table lie on the device, where the kernels read them, so that a captured CUDA graph can be
replayed with others. The host knows upper bounds only.

A decode step of many long sequences is built in a tenth of a millisecond: all of a batch lies in one block of memory,
filled on the host through numpy, brought to the device in one copy and cut into views there.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fp8kv.kernels.layout import MAX_PAGE_SIZE, is_page_size

NewTokens = tuple[Sequence[int], int, Sequence[int]]
"""A sequence's part in a batch: the ids of its new tokens, how many tokens of it are in the cache, its pages."""

_Integers = npt.NDArray[np.int64]

# Triton compiles a kernel anew for pointers that are not multiples of 16 bytes, so that every part starts at one
_ALIGNMENT = 16


@dataclass(frozen=True)
class Batch:
    """The new tokens of one forward pass, and where they and the tokens before them lie in the cache.

    Attributes:
        token_ids: [tokens] int64, the new tokens of all sequences in a row.
        positions: [tokens] int64, each token's position in its sequence.
        slots: [tokens] int64, ``page * page_size + offset`` of each new token; negative for padding, which is written
            nowhere.
        page_table: [sequences, max_pages] int32, the pages of each sequence in order; entries behind a sequence's last
            page have no meaning. Rows may lie at any stride.
        prefix_lens: [sequences] int32, tokens that were in the cache before this pass.
        cu_seqlens: [sequences + 1] int32, where the new tokens of each sequence start, and where the last end.
        seq_lens: [sequences] int32, prefix and new tokens; 0 for a sequence that only pads the batch.
        max_new_tokens: no sequence has more new tokens.
        max_prefix_len: no sequence has a longer prefix.
        max_seq_len: no sequence is longer.
        num_decodes: the first so many sequences have exactly one new token each, so ``query[b]`` belongs to sequence b.
        max_prefill_prefix_len: no sequence behind those has a longer prefix; 0 where there is none.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    page_table: Tensor
    prefix_lens: Tensor
    cu_seqlens: Tensor
    seq_lens: Tensor
    max_new_tokens: int
    max_prefix_len: int
    max_seq_len: int
    num_decodes: int
    max_prefill_prefix_len: int

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has exactly one new token."""
        return self.num_decodes == self.num_sequences

    @property
    def num_tokens(self) -> int:
        """New tokens, padding included."""
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        """Sequences, padding included."""
        return self.seq_lens.shape[0]

    def token_sequences(self) -> Tensor:
        """Return the sequence of each new token, [tokens] int64; nothing is read back to the host."""
        tokens = torch.arange(self.num_tokens, dtype=torch.int32, device=self.cu_seqlens.device)
        found = torch.searchsorted(self.cu_seqlens[1:], tokens, right=True)
        # tokens behind the last sequence are padding; they need a row that exists
        return found.clamp(max=self.num_sequences - 1)


def make_batch(sequences: Sequence[NewTokens], page_size: int, device: torch.device | str) -> Batch:
    """Pack sequences into a batch.

    Args:
        sequences: of each sequence the ids of its new tokens, at least one; how many tokens before them are in the
            cache; and its pages in order, as many as prefix and new tokens need, or more. Pages in an ``array('i')``
            are copied as a block.
        page_size: tokens of a page, a power of two.
        device: where the model runs.

    Raises:
        ValueError: there is no sequence, or one has no new token or too few pages.
    """
    if not is_page_size(page_size):
        raise ValueError(
            f"page_size is {page_size}, but must be a power of two up to {MAX_PAGE_SIZE}"
        )
    if not sequences:
        raise ValueError("a batch needs at least one sequence")
    new = np.array([len(token_ids) for token_ids, _, _ in sequences])
    prefix = np.array([prefix_len for _, prefix_len, _ in sequences])
    needed = -(-(prefix + new) // page_size)
    _check(sequences, new, prefix, needed)
    num_tokens, num_sequences, max_pages = int(new.sum()), len(sequences), int(needed.max())
    ends, total = new.cumsum(), prefix + new

    block = _Block(num_tokens, num_sequences, max_pages, torch.device(device))
    host = block.host
    _fill_pages(host["page_table"], [pages for _, _, pages in sequences], needed.tolist())
    rows = np.repeat(np.arange(num_sequences), new)
    positions = np.arange(num_tokens) + (total - ends)[rows]
    pages = host["page_table"][rows, positions // page_size].astype(np.int64)
    host["token_ids"][:] = np.fromiter(
        chain.from_iterable(token_ids for token_ids, _, _ in sequences), np.int64, num_tokens
    )
    host["positions"][:] = positions
    host["slots"][:] = pages * page_size + positions % page_size
    host["prefix_lens"][:] = prefix
    host["cu_seqlens"][0] = 0
    host["cu_seqlens"][1:] = ends
    host["seq_lens"][:] = total

    longer = new > 1
    num_decodes = int(longer.argmax()) if longer.any() else num_sequences
    return Batch(
        **block.upload(),
        max_new_tokens=int(new.max()),
        max_prefix_len=int(prefix.max()),
        max_seq_len=int(total.max()),
        num_decodes=num_decodes,
        max_prefill_prefix_len=int(prefix[num_decodes:].max(initial=0)),
    )


class _Block:
    """The tensors of one batch, one behind the other in a single block of memory.

    Attributes:
        host: arrays to fill, by the names of the batch's attributes.
    """

    def __init__(
        self, num_tokens: int, num_sequences: int, max_pages: int, device: torch.device
    ) -> None:
        shapes: dict[str, tuple[type[np.signedinteger[Any]], tuple[int, ...]]] = {
            "token_ids": (np.int64, (num_tokens,)),
            "positions": (np.int64, (num_tokens,)),
            "slots": (np.int64, (num_tokens,)),
            "prefix_lens": (np.int32, (num_sequences,)),
            "cu_seqlens": (np.int32, (num_sequences + 1,)),
            "seq_lens": (np.int32, (num_sequences,)),
            "page_table": (np.int32, (num_sequences, max_pages)),
        }
        offsets, end = {}, 0
        for name, (dtype, shape) in shapes.items():
            offsets[name] = end
            num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
            end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        # from pinned memory the copy does not hold up the host
        self._staging = torch.empty(end // 8, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device, self._shapes, self._offsets = device, shapes, offsets
        buffer = self._staging.numpy()
        self.host = {
            name: np.ndarray(shape, dtype, buffer, offsets[name])
            for name, (dtype, shape) in shapes.items()
        }

    def upload(self) -> dict[str, Tensor]:
        """Return views of the block on the device, by the same names."""
        wide = self._staging.to(self._device, non_blocking=True)
        narrow = wide.view(torch.int32)
        views = {}
        for name, (dtype, shape) in self._shapes.items():
            source = wide if dtype is np.int64 else narrow
            start = self._offsets[name] // source.element_size()
            # one operation, where slicing and reshaping would be two
            strides = (1,) if len(shape) == 1 else (shape[1], 1)
            views[name] = source.as_strided(shape, strides, start)
        return views


def _fill_pages(
    table: npt.NDArray[np.int32], pages: Sequence[Sequence[int]], counts: Sequence[int]
) -> None:
    width = table.shape[1]
    # a copy between memoryviews takes a third of the time of one between arrays
    flat = table.reshape(-1).data
    for number, (own, count) in enumerate(zip(pages, counts, strict=True)):
        block = own if isinstance(own, array) and own.typecode == "i" else array("i", own)
        flat[number * width : number * width + count] = memoryview(block)[:count]
        if count < width:
            # whoever reads behind a row's end is wrong, and shall not find a page
            table[number, count:] = -1


def _check(
    sequences: Sequence[NewTokens], new: _Integers, prefix: _Integers, needed: _Integers
) -> None:
    is_empty = (new < 1) | (prefix < 0)
    if is_empty.any():
        number = int(is_empty.argmax())
        raise ValueError(
            f"sequence {number} has {new[number]} new tokens behind {prefix[number]}; "
            "it needs at least one behind 0 or more"
        )
    held = np.array([len(pages) for _, _, pages in sequences])
    is_short = held < needed
    if is_short.any():
        number = int(is_short.argmax())
        raise ValueError(
            f"sequence {number} has {held[number]} pages, but its {prefix[number] + new[number]} "
            f"tokens need {needed[number]}"
        )
