"""The reference backend: plain torch, float32 arithmetic, any device, every kind of cache and of attention.

It is the oracle of the other backends and what runs where there is no GPU. Decoding reads nothing back to the host, so
it can be captured in a CUDA graph; what prefills is taken sequence by sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8kv.kernels.fp8 import dequantize, quantize
from fp8kv.kernels.layout import gather_tokens
from fp8kv.kernels.rope import rotate, split_columns
from fp8kv.runtime.backends.base import AttentionOptions, PreparedQkv, Rope
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
            _write(layer.k, encode(row, layer, layer.k_scale), batch.slots)
            return
        _write(layer.k, encode(key, layer, layer.k_scale), batch.slots)
        _write(layer.v, encode(value, layer, layer.v_scale), batch.slots)

    def fuses_rope(self, _layer: LayerCache) -> bool:
        """Rotation stays the model's, so that its numbers are those of plain transformers."""
        return False

    def prepare_prefill_qkv(
        self,
        layer: LayerCache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch: Batch,
        rope: Rope | None = None,
    ) -> PreparedQkv:
        """Rotate where asked, and write; attention reads all of K and V from the cache."""
        if rope is not None:
            query, key = _rotate(query, rope), _rotate(key, rope)
        self.write(layer, key, value, batch)
        return PreparedQkv(query, None, None)

    def attend(
        self,
        layer: LayerCache,
        query: Tensor,
        batch: Batch,
        options: AttentionOptions,
        key: Tensor | None = None,
        value: Tensor | None = None,
    ) -> Tensor:
        """Attend with every new token over its sequence."""
        out = query.new_zeros(*query.shape[:2], layer.v_dim)
        if batch.is_decode:
            _attend_decodes(layer, query, batch, batch.max_seq_len, options, out)
            return out
        bounds, lengths = batch.cu_seqlens.tolist(), batch.seq_lens.tolist()
        if batch.num_decodes:
            longest = max(lengths[: batch.num_decodes])
            _attend_decodes(layer, query, batch, longest, options, out)
        new = None if key is None or value is None else (key, value)
        for sequence in range(batch.num_decodes, batch.num_sequences):
            (first, last), length = bounds[sequence : sequence + 2], lengths[sequence]
            if first == last:
                continue
            keys, values = _read_sequence(
                layer, batch.page_table[sequence], length, new, slice(first, last)
            )
            step = max(1, _MOST_SCORES // (query.shape[1] * length))
            for start in range(first, last, step):
                rows = slice(start, min(start + step, last))
                out[rows] = _attend(
                    query[None, rows], keys, values, batch.positions[None, rows], options
                )[0]
        return out


def encode(values: Tensor, layer: LayerCache, scale: Tensor) -> Tensor:
    """Return K or V as the pages of ``layer`` hold them, in their dtype.

    Args:
        values: [tokens, kv_heads, dim], or [tokens, dim] of an MLA row or a part of it.
        layer: says how values are held.
        scale: its K or its V scale.
    """
    if layer.fmt is None:
        return values.to(layer.k.dtype)
    if layer.v is not None:
        scale = scale.view(-1, 1)
    codes = quantize(values, scale, layer.fmt)
    return codes if layer.holds_codes else dequantize(codes, scale, layer.k.dtype)


def _rotate(heads: Tensor, rope: Rope) -> Tensor:
    """Return ``heads [tokens, heads, dim]`` rotated in float32 and rounded once, to their own dtype."""
    width = rope.cos.shape[-1]
    # the two halves of a row hold the same numbers
    angles = torch.cat((rope.cos[:, : width // 2], rope.sin[:, : width // 2]), dim=-1).float()
    tokens = torch.arange(len(angles), device=angles.device)
    rest, turned = split_columns(heads, width, rope_last=False)
    turned = rotate(turned, tokens, angles, interleaved=False).to(heads.dtype)
    return torch.cat((turned, rest), dim=-1)


def _attend_decodes(
    layer: LayerCache,
    query: Tensor,
    batch: Batch,
    longest: int,
    options: AttentionOptions,
    out: Tensor,
) -> None:
    """Attend with the sequences of one new token, which stand first, all at once; none has more than ``longest``."""
    step = max(1, _MOST_NUMBERS // max(1, longest * _numbers_per_token(layer)))
    for start in range(0, batch.num_decodes, step):
        rows = slice(start, min(start + step, batch.num_decodes))
        lengths = batch.seq_lens[rows]
        keys, values = _read_padded(layer, batch.page_table[rows], lengths, longest)
        last_token = lengths.long()[:, None] - 1
        out[rows] = _attend(query[rows, None], keys, values, last_token, options)[:, 0]


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


def _read_sequence(
    layer: LayerCache,
    pages: Tensor,
    length: int,
    new: tuple[Tensor, Tensor] | None,
    rows: slice,
) -> tuple[Tensor, Tensor]:
    """Return K and V of one sequence, [1, length, kv_heads, dim] float32.

    Args:
        layer: the cache.
        pages: [max_pages], of the sequence.
        length: tokens of the sequence.
        new: K and V of all new tokens, where the cache's are not to be read.
        rows: the sequence's own among them.
    """
    cached = length if new is None else length - (rows.stop - rows.start)
    keys = gather_tokens(layer.k, pages, cached)[None]
    values = gather_tokens(layer.v, pages, cached)[None] if layer.v is not None else None
    keys, values = _split(layer, keys, values)
    if new is None:
        return keys, values
    key, value = (part[None, rows].float() for part in new)
    if layer.v is None:
        # the two are parts of one row, whose first is V, too
        key, value = torch.cat((key, value), dim=-1)[:, :, None], key[:, :, None]
    return torch.cat((keys, key), dim=1), torch.cat((values, value), dim=1)


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
