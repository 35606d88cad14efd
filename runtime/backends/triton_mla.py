"""Multi-head latent attention by Triton kernels: absorbed where few tokens are new, expanded where many are.

Absorbed, a query attends to the latents themselves: 2176 operations for each head and visible token at DeepSeek's
widths. With K and V expanded it takes 640, and every row has to go through ``kv_b_proj``, which for a new token costs
what absorbing its query does, and comes on top for a token of the prefix. So:

* A sequence that decodes runs absorbed, through ``decode_mla``.
* A few new tokens run absorbed, too, through the same kernel: each is a sequence of its own that ends at its own
  position, so causality costs nothing.
* Many new tokens attend by ``extend`` to rows that were expanded: to their own, read back from the cache unless they
  are given as they were computed, and to those of the prefix. Heads are taken in groups, so that what is expanded
  at a time stays small however long a prefix is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fp8kv.kernels.decode_mla import decode_mla
from fp8kv.kernels.extend import extend
from fp8kv.kernels.gather import gather_rows
from fp8kv.runtime.backends.base import AttentionOptions
from fp8kv.runtime.batch import Batch
from fp8kv.runtime.latent_projection import LatentProjection
from fp8kv.runtime.paged_cache import LayerCache

_FEW_TOKENS = 32
"""So many new tokens of a sequence run absorbed in any case: launches weigh more than operations."""

_EXPANSION_COST = 2
"""What an operation that expands a prefix counts, against one of attention.

Measured on an H200 at 128 heads: both ways take as long for 256 new tokens of each of 8 sequences behind 1024 others, and
for 512 of one behind 4096; 8192 behind 8192 take 23 ms expanded and 54 absorbed.
"""

_MOST_EXPANDED = 2**30
"""Bytes of K and V that are expanded at a time, where a single head has not more."""


def attend_absorbed(
    layer: LayerCache, query: Tensor, batch: Batch, options: AttentionOptions
) -> Tensor:
    """Attend with absorbed queries over the cache, the new tokens included.

    Args:
        layer: rows of 512 + 64 columns.
        query: [tokens, heads, 576].
        batch: the new tokens.
        options: only the scaling is read.

    Returns:
        [tokens, heads, 512] of the query's dtype.
    """
    if batch.is_decode:
        page_table, seq_lens = batch.page_table, batch.seq_lens
    else:
        page_table = batch.page_table.index_select(0, batch.token_sequences())
        # padding sees nothing
        seq_lens = (batch.positions + 1).where(batch.slots >= 0, 0).int()
    return decode_mla(
        query,
        layer.k,
        page_table,
        seq_lens,
        layer.k_scale,
        sm_scale=options.scaling,
        max_seq_len=batch.max_seq_len,
    )


def attend_latents(
    layer: LayerCache,
    query: Tensor,
    batch: Batch,
    parts: tuple[Batch | None, Batch | None],
    options: AttentionOptions,
    projection: LatentProjection,
    new_rows: Tensor | None,
) -> Tensor:
    """Attend with queries that are not absorbed.

    Args:
        layer: rows of 512 + 64 columns.
        query: [tokens, heads, nope_dim + rope_dim].
        batch: the new tokens.
        parts: the batch's sequences that decode, whose rows come first, and the others; None for none.
        options: only the scaling is read.
        projection: from the latent to K and V.
        new_rows: [tokens, 576], of the new tokens, where sequences that prefill shall not read theirs from the cache.

    Returns:
        [tokens, heads, v_dim] of the query's dtype.
    """
    decodes, prefills = parts
    if prefills is None:
        return _absorb_and_attend(layer, query, batch, options, projection)
    if new_rows is None and not _expands(prefills, projection, layer.k.shape[-1]):
        return _absorb_and_attend(layer, query, batch, options, projection)
    out = query.new_empty(*query.shape[:2], projection.v_dim)
    first = batch.num_decodes
    if decodes is not None:
        out[:first] = _absorb_and_attend(layer, query[:first], decodes, options, projection)
    rows = new_rows[first:] if new_rows is not None else _read_new(layer, prefills, query.dtype)
    _attend_expanded(layer, query[first:], rows, prefills, options, projection, out[first:])
    return out


def _expands(batch: Batch, projection: LatentProjection, row_dim: int) -> bool:
    """Say whether expanding the rows of prefixes costs less than it saves; per head, in products."""
    if batch.max_new_tokens <= _FEW_TOKENS:
        return False
    rope_dim = row_dim - projection.latent_dim
    absorbed = projection.latent_dim + row_dim
    expanded = projection.nope_dim + rope_dim + projection.v_dim
    # new tokens see half of those beside them on average
    seen = batch.max_prefix_len + batch.num_tokens / batch.num_sequences / 2
    saved = batch.num_tokens * seen * (absorbed - expanded)
    row = projection.latent_dim * (projection.nope_dim + projection.v_dim)
    return saved > _EXPANSION_COST * row * batch.num_sequences * batch.max_prefix_len


def _absorb_and_attend(
    layer: LayerCache,
    query: Tensor,
    batch: Batch,
    options: AttentionOptions,
    projection: LatentProjection,
) -> Tensor:
    latents = attend_absorbed(layer, projection.absorb(query), batch, options)
    return projection.to_values(latents)


def _attend_expanded(
    layer: LayerCache,
    query: Tensor,
    new_rows: Tensor,
    batch: Batch,
    options: AttentionOptions,
    projection: LatentProjection,
    out: Tensor,
) -> None:
    """Attend to ``new_rows [tokens, 576]`` and to the prefixes, all of them expanded, into ``out``."""
    rows = _read_prefixes(layer, batch, query.dtype) if batch.max_prefix_len else None
    k_cache = v_cache = page_table = None
    if rows is not None:
        page_table = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
        page_table = page_table.view(batch.num_sequences, -1)
    unit = torch.ones(1, device=query.device)
    num_rows = new_rows.shape[0] + (rows.flatten(0, 1).shape[0] if rows is not None else 0)
    for heads in _groups(projection, num_rows, new_rows):
        part = projection.of_heads(heads)
        key, value = part.expand(new_rows)
        if rows is not None:
            both = part.expand(rows.flatten(0, 1))
            k_cache, v_cache = (x.view(*rows.shape[:2], *x.shape[1:]) for x in both)
        extend(
            query[:, heads],
            key,
            value,
            k_cache,
            v_cache,
            page_table,
            batch.prefix_lens,
            batch.cu_seqlens,
            unit,
            unit,
            sm_scale=options.scaling,
            max_new_tokens=batch.max_new_tokens,
            max_prefix_len=batch.max_prefix_len,
            out=out[:, heads],
        )


def _groups(projection: LatentProjection, num_rows: int, rows: Tensor) -> Iterator[slice]:
    """Give groups of heads whose K and V of so many rows, in the dtype of ``rows``, are few enough bytes."""
    num_heads, width, latent_dim = projection.weight.shape
    # K with its rope part, and beside it both parts as they come out of the projection
    numbers = projection.nope_dim + rows.shape[1] - latent_dim + width
    size = max(1, _MOST_EXPANDED // max(1, num_rows * numbers * rows.element_size()))
    for start in range(0, num_heads, size):
        yield slice(start, start + size)


def _read_new(layer: LayerCache, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Return the rows of the new tokens as the cache gives them back, [tokens, 576]."""
    if not layer.holds_codes:
        return layer.k.flatten(0, 1).index_select(0, batch.slots.clamp(min=0))
    return gather_rows(
        layer.k,
        batch.page_table,
        batch.cu_seqlens,
        layer.k_scale,
        total_tokens=batch.num_tokens,
        starts=batch.prefix_lens,
        dtype=dtype,
    )


def _read_prefixes(layer: LayerCache, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Return the pages of all prefixes, as many for each sequence, unquantised: [pages, page_size, 576].

    Behind a prefix's last token they hold anything.
    """
    page_size = layer.k.shape[1]
    count = -(-batch.max_prefix_len // page_size)
    pages = torch.arange(count, device=layer.k.device) * page_size
    # entries behind the last page have no meaning; any page that exists will do
    table = batch.page_table[:, :count].where(pages < batch.prefix_lens[:, None], 0)
    if not layer.holds_codes:
        return layer.k.index_select(0, table.flatten())
    tokens = count * page_size
    bounds = torch.arange(0, (len(table) + 1) * tokens, tokens, device=table.device)
    rows = gather_rows(
        layer.k,
        table,
        bounds.int(),
        layer.k_scale,
        total_tokens=len(table) * tokens,
        dtype=dtype,
    )
    return rows.view(-1, page_size, rows.shape[1])
