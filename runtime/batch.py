"""One forward pass over the new tokens of several sequences, packed in a row: what the model and the backends read.

Lengths, slots and the page table lie on the device, where the kernels read them, so that a captured CUDA graph can be
replayed with others. The host knows upper bounds only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fp8kv.kernels.layout import MAX_PAGE_SIZE, is_page_size


@dataclass(frozen=True)
class Batch:
    """The new tokens of one forward pass, and where they and the tokens before them lie in the cache.

    Attributes:
        token_ids: [tokens] int64, the new tokens of all sequences in a row.
        positions: [tokens] int64, each token's position in its sequence.
        slots: [tokens] int64, ``page * page_size + offset`` of each new token; negative for padding, which is written
            nowhere.
        page_table: [sequences, max_pages] int32, the pages of each sequence in order; entries behind a sequence's last
            page have no meaning.
        prefix_lens: [sequences] int32, tokens that were in the cache before this pass.
        cu_seqlens: [sequences + 1] int32, where the new tokens of each sequence start, and where the last end.
        seq_lens: [sequences] int32, prefix and new tokens; 0 for a sequence that only pads the batch.
        max_new_tokens: no sequence has more new tokens.
        max_prefix_len: no sequence has a longer prefix.
        max_seq_len: no sequence is longer.
        is_decode: every sequence has exactly one new token, so ``query[b]`` belongs to sequence b.
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
    is_decode: bool

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


def make_batch(
    sequences: Sequence[tuple[Sequence[int], int, Sequence[int]]],
    page_size: int,
    device: torch.device | str,
) -> Batch:
    """Pack sequences into a batch.

    Args:
        sequences: of each sequence the ids of its new tokens, at least one; how many tokens before them are in the
            cache; and its pages in order, as many as prefix and new tokens need, or more.
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
    new = [len(token_ids) for token_ids, _, _ in sequences]
    prefix = [prefix_len for _, prefix_len, _ in sequences]
    total = [before + count for before, count in zip(prefix, new, strict=True)]
    needed = [-(-length // page_size) for length in total]
    _check(sequences, needed)
    max_pages = max(needed)
    # -1 where a row ends: whoever reads there is wrong, and shall not find a page
    rows = [
        [*pages[:count], *[-1] * (max_pages - count)]
        for (_, _, pages), count in zip(sequences, needed, strict=True)
    ]
    # numpy reads nested lists three times as fast, and this is the bulk of a decode step's batch
    page_table = torch.from_numpy(np.array(rows, dtype=np.int32))
    starts = torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    row = torch.repeat_interleave(torch.tensor(new))
    first = torch.tensor(prefix) - starts[:-1]
    positions = torch.arange(len(row)) + first[row]
    pages = page_table[row, positions // page_size].long()
    token_ids = torch.tensor([token for ids, _, _ in sequences for token in ids])

    def move(tensor: Tensor) -> Tensor:
        if torch.device(device).type == "cuda":
            # from pinned memory the copy does not hold up the host
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(device)

    return Batch(
        token_ids=move(token_ids),
        positions=move(positions),
        slots=move(pages * page_size + positions % page_size),
        page_table=move(page_table),
        prefix_lens=move(torch.tensor(prefix, dtype=torch.int32)),
        cu_seqlens=move(starts),
        seq_lens=move(torch.tensor(total, dtype=torch.int32)),
        max_new_tokens=max(new),
        max_prefix_len=max(prefix),
        max_seq_len=max(total),
        is_decode=max(new) == 1,
    )


def _check(
    sequences: Sequence[tuple[Sequence[int], int, Sequence[int]]], needed: Sequence[int]
) -> None:
    for number, ((token_ids, prefix_len, pages), count) in enumerate(
        zip(sequences, needed, strict=True)
    ):
        if not token_ids or prefix_len < 0:
            raise ValueError(
                f"sequence {number} has {len(token_ids)} new tokens behind {prefix_len}; "
                "it needs at least one behind 0 or more"
            )
        if len(pages) < count:
            raise ValueError(
                f"sequence {number} has {len(pages)} pages, but its {prefix_len + len(token_ids)} tokens "
                f"need {count}"
            )
