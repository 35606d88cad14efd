"""A batch in two: the sequences that decode, which stand first, and the others, for which other kernels are made."""

from __future__ import annotations

from dataclasses import replace

from fp8kv.runtime.batch import Batch


class BatchParts:
    """Cuts a batch once for all layers of a forward pass; nothing is read back from the device."""

    def __init__(self) -> None:
        """Keep no batch yet."""
        self._cut: Batch | None = None
        self._parts: tuple[Batch | None, Batch | None] = (None, None)

    def of(self, batch: Batch) -> tuple[Batch | None, Batch | None]:
        """Return the sequences that decode and those that prefill, None where there are none.

        The rows of the second part in packed tensors begin at ``batch.num_decodes``.
        """
        if self._cut is not batch:
            self._cut, self._parts = batch, _cut(batch)
        return self._parts


def _cut(batch: Batch) -> tuple[Batch | None, Batch | None]:
    if batch.is_decode:
        return batch, None
    if not batch.num_decodes:
        return None, batch
    return _first(batch, batch.num_decodes), _others(batch, batch.num_decodes)


def _first(batch: Batch, count: int) -> Batch:
    return replace(
        batch,
        token_ids=batch.token_ids[:count],
        positions=batch.positions[:count],
        slots=batch.slots[:count],
        page_table=batch.page_table[:count],
        prefix_lens=batch.prefix_lens[:count],
        cu_seqlens=batch.cu_seqlens[: count + 1],
        seq_lens=batch.seq_lens[:count],
        max_new_tokens=1,
        max_prefill_prefix_len=0,
    )


def _others(batch: Batch, count: int) -> Batch:
    # Copies: a pointer that is no multiple of 16 bytes would have the kernels compiled anew.
    return replace(
        batch,
        token_ids=batch.token_ids[count:].clone(),
        positions=batch.positions[count:].clone(),
        slots=batch.slots[count:].clone(),
        page_table=batch.page_table[count:].clone(),
        prefix_lens=batch.prefix_lens[count:].clone(),
        cu_seqlens=batch.cu_seqlens[count:] - count,
        seq_lens=batch.seq_lens[count:].clone(),
        max_prefix_len=batch.max_prefill_prefix_len,
        num_decodes=0,
    )
