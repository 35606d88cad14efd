"""The reference backend: plain torch, float32 arithmetic, any device, every kind of cache and of attention.

It is the oracle of the other backends and what runs where there is no GPU. Decoding reads nothing back to the host, so
it can be captured in a CUDA graph; a ragged batch is taken sequence by sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8kv.kernels.fp8 import dequantize, quantize
from fp8kv.kernels.layout import gather_tokens
from fp8kv.runtime.backends.base import AttentionOptions
from fp8kv.runtime.batch import Batch
from fp8kv.runtime.paged_cache import LayerCache

_MOST_SCORES = 2**26
"""Scores that are held at a time, 256 MB in float32: longer prompts are taken in pieces."""

_MOST_NUMBERS = 2**28
"""Numbers of K and V that a decode step holds at a time, 1 GB in float32: larger batches are taken in pieces."""


class ReferenceBackend:
    """Attention in plain torch; see :class:`~fp8kv.runtime.backends.base.Backend` for the contract."""

    @property
    def name(self) -> str:
        """The name by which users choose it."""
        return "reference"

    def write(self, layer: LayerCache, key: Tensor, value: Tensor, batch: Batch) -> None:
        """Write new tokens to their slots."""
        if layer.v is None:
            row = torch.cat([key, value], dim=-1)
            _write(layer.k, _encode(row, layer, layer.k_scale), batch.slots)
            return
        _write(layer.k, _encode(key, layer, layer.k_scale.view(-1, 1)), batch.slots)
        _write(layer.v, _encode(value, layer, layer.v_scale.view(-1, 1)), batch.slots)

    def attend(
        self, layer: LayerCache, query: Tensor, batch: Batch, options: AttentionOptions
    ) -> Tensor:
        """Attend with every new token over its sequence."""
        out = query.new_zeros(*query.shape[:2], layer.v_dim)
        if batch.is_decode:
            step = max(1, _MOST_NUMBERS // max(1, batch.max_seq_len * _numbers_per_token(layer)))
            for start in range(0, batch.num_sequences, step):
                rows = slice(start, start + step)
                lengths = batch.seq_lens[rows]
                keys, values = _read_padded(
                    layer, batch.page_table[rows], lengths, batch.max_seq_len
                )
                last_token = lengths.long()[:, None] - 1
                out[rows] = _attend(query[rows, None], keys, values, last_token, options)[:, 0]
            return out
        bounds = batch.cu_seqlens.tolist()
        for sequence, length in enumerate(batch.seq_lens.tolist()):
            first, last = bounds[sequence : sequence + 2]
            if first == last:
                continue
            keys, values = _read_sequence(layer, batch.page_table[sequence], length)
            step = max(1, _MOST_SCORES // (query.shape[1] * length))
            for start in range(first, last, step):
                rows = slice(start, min(start + step, last))
                out[rows] = _attend(
                    query[None, rows], keys, values, batch.positions[None, rows], options
                )[0]
        return out


def _encode(values: Tensor, layer: LayerCache, scale: Tensor) -> Tensor:
    """Return ``values`` as the cache holds them, in its dtype."""
    if layer.fmt is None:
        return values.to(layer.k.dtype)
    codes = quantize(values, scale, layer.fmt)
    return codes if layer.holds_codes else dequantize(codes, scale, layer.k.dtype)


def _decode(stored: Tensor, layer: LayerCache, scale: Tensor) -> Tensor:
    return dequantize(stored, scale) if layer.holds_codes else stored.float()


def _write(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    """Write ``rows`` to their slots without looking at the slots on the host.

    A boolean index would have to be counted there. Instead the rows of padding become copies of the first real row and
    go where it goes; without a real row, what lies in slot 0 is written there again.
    """
    flat = cache.flatten(0, 1)
    if cache.element_size() == 1:
        # indexed copies of FP8 are not there on every device; those of bytes are
        flat, rows = flat.view(torch.uint8), rows.view(torch.uint8)
    real = slots >= 0
    first = real.int().argmax().reshape(1)
    targets = torch.where(real, slots, slots.index_select(0, first)).clamp(min=0)
    shape = (-1,) + (1,) * (rows.dim() - 1)
    substitute = torch.where(real.any(), rows.index_select(0, first), flat[:1])
    flat.index_copy_(0, targets.long(), torch.where(real.view(shape), rows, substitute))


def _read_sequence(layer: LayerCache, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return K and V of one sequence, [1, length, kv_heads, dim] float32."""
    keys = gather_tokens(layer.k, pages, length)[None]
    values = gather_tokens(layer.v, pages, length)[None] if layer.v is not None else None
    return _split(layer, keys, values)


def _numbers_per_token(layer: LayerCache) -> int:
    """Return how many float32 numbers a token is read as; V of an MLA row is a view."""
    return sum(cache[0, 0].numel() for cache in (layer.k, layer.v) if cache is not None)


def _read_padded(
    layer: LayerCache, page_table: Tensor, seq_lens: Tensor, max_seq_len: int
) -> tuple[Tensor, Tensor]:
    """Return K and V of all sequences, [sequences, tokens, kv_heads, dim] float32, 0 behind a sequence's end."""
    page_size = layer.k.shape[1]
    table = page_table[:, : -(-max_seq_len // page_size)]
    positions = torch.arange(table.shape[1] * page_size, device=table.device)
    real = positions < seq_lens[:, None]
    # entries behind the last page may hold anything, and so may the bytes behind the last token, NaN included
    table = table.masked_fill(~real[:, ::page_size], 0).long()

    def read(cache: Tensor) -> Tensor:
        stored = cache[table].flatten(1, 2)
        return stored.masked_fill(~real.view(*real.shape, *[1] * (stored.dim() - 2)), 0)

    keys, values = read(_bytes(layer.k)), None
    if layer.v is not None:
        values = read(_bytes(layer.v)).view(layer.v.dtype)
    return _split(layer, keys.view(layer.k.dtype), values)


def _bytes(cache: Tensor) -> Tensor:
    """Return an FP8 cache as bytes, whose 0 is the code of 0.0; others as they are."""
    return cache.view(torch.uint8) if cache.element_size() == 1 else cache


def _split(layer: LayerCache, keys: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return float32 K and V with a dimension of heads; V of an MLA row is its first columns."""
    if values is None:
        rows = _decode(keys, layer, layer.k_scale)[:, :, None]
        return rows, rows[..., : layer.v_dim]
    return (
        _decode(keys, layer, layer.k_scale.view(-1, 1)),
        _decode(values, layer, layer.v_scale.view(-1, 1)),
    )


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, options: AttentionOptions
) -> Tensor:
    """Compute masked softmax attention in float32.

    Args:
        query: [sequences, new, q_heads, k_dim].
        keys: [sequences, tokens, kv_heads, k_dim].
        values: [sequences, tokens, kv_heads, v_dim].
        positions: [sequences, new], of the query's tokens; a token at -1 sees nothing and gets 0.
        options: how to attend.

    Returns:
        [sequences, new, q_heads, v_dim] of the query's dtype.
    """
    kv_heads = keys.shape[2]
    grouped = query.float().reshape(*query.shape[:2], kv_heads, -1, query.shape[-1])
    scores = torch.einsum("bnhgd,bthd->bnhgt", grouped, keys) * options.scaling
    if options.soft_cap is not None:
        scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
    column = torch.arange(keys.shape[1], device=keys.device)
    own = positions[..., None]
    hidden = column > own
    if options.window is not None:
        hidden = hidden | (column <= own - options.window)
    if options.chunk is not None:
        hidden = hidden | (column < own - own % options.chunk)
    scores = scores.masked_fill(hidden[:, :, None, None], -math.inf)
    total = scores.logsumexp(-1)
    if options.sinks is not None:
        total = torch.logaddexp(total, options.sinks.float().view(kv_heads, -1))
    # what sees nothing has no weights, not NaN
    total = total.masked_fill(total == -math.inf, 0.0)
    weights = (scores - total[..., None]).exp()
    out = torch.einsum("bnhgt,bthd->bnhgd", weights, values)
    return out.flatten(2, 3).to(query.dtype)
