"""The Triton backend: fp8kv's kernels over an FP8 cache, without a look at the device, so that graphs can capture it.

What goes where is decided by :func:`has_kernel`, from shapes and types alone:

* FP8 grouped-query attention decodes by ``decode_gqa`` and prefills by ``extend``, which reads the new tokens from the
  cache, where ``write`` has put them.
* FP8 MLA of 512 + 64 columns decodes by ``decode_mla``, and prefills by it, too: each new token is a sequence of its
  own that ends at its own position, so causality costs nothing. The queries come absorbed, and absorbed attention is
  all that can be done with them; at 128 heads the kernel is bound by the matrix rate, so it loses nothing by reading
  the rows once for each token. Expanding K and V first would take 3.4 times fewer operations, but needs the model's
  weights, which a backend does not have.
* All else is the reference backend's: caches that hold no codes (``bf16``, ``emulate``, ``float32``), whose purpose is
  to be compared with and not to be fast; chunked attention; widths that no kernel takes; and float32 queries, which
  the kernels would round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8kv.kernels.cache_write import cache_write
from fp8kv.kernels.decode_gqa import decode_gqa
from fp8kv.kernels.decode_mla import LATENT_DIM, ROW_DIM, decode_mla
from fp8kv.kernels.extend import extend
from fp8kv.kernels.mla_pack import mla_pack
from fp8kv.runtime.backends.base import AttentionOptions
from fp8kv.runtime.backends.reference import ReferenceBackend
from fp8kv.runtime.batch import Batch
from fp8kv.runtime.paged_cache import LayerCache

_QUERY_TYPES = (torch.bfloat16, torch.float16)
_WIDTH_STEP = 16
_MAX_WIDTH = 256


class TritonBackend:
    """Attention by Triton kernels; see :class:`~fp8kv.runtime.backends.base.Backend` for the contract."""

    def __init__(self) -> None:
        """Make a backend; it keeps nothing between calls."""
        self._reference = ReferenceBackend()

    @property
    def name(self) -> str:
        """The name by which users choose it."""
        return "triton"

    def write(self, layer: LayerCache, key: Tensor, value: Tensor, batch: Batch) -> None:
        """Write new tokens to their slots; codes equal the reference backend's, bit for bit."""
        if not layer.holds_codes:
            self._reference.write(layer, key, value, batch)
        elif layer.v is None:
            mla_pack(key, value, layer.k, batch.slots, layer.k_scale)
        else:
            cache_write(key, value, layer.k, layer.v, batch.slots, layer.k_scale, layer.v_scale)

    def attend(
        self, layer: LayerCache, query: Tensor, batch: Batch, options: AttentionOptions
    ) -> Tensor:
        """Attend with every new token over its sequence."""
        if not has_kernel(layer, query, options):
            return self._reference.attend(layer, query, batch, options)
        if layer.v is None:
            return _attend_mla(layer, query, batch, options)
        sinks = options.sinks.float() if options.sinks is not None else None
        if batch.is_decode:
            return decode_gqa(
                query,
                layer.k,
                layer.v,
                batch.page_table,
                batch.seq_lens,
                layer.k_scale,
                layer.v_scale,
                sm_scale=options.scaling,
                max_seq_len=batch.max_seq_len,
                window=options.window,
                soft_cap=options.soft_cap,
                sinks=sinks,
            )
        return extend(
            query,
            None,
            None,
            layer.k,
            layer.v,
            batch.page_table,
            batch.prefix_lens,
            batch.cu_seqlens,
            layer.k_scale,
            layer.v_scale,
            sm_scale=options.scaling,
            max_new_tokens=batch.max_new_tokens,
            max_prefix_len=batch.max_prefix_len,
            window=options.window,
            soft_cap=options.soft_cap,
            sinks=sinks,
        )


def has_kernel(layer: LayerCache, query: Tensor, options: AttentionOptions) -> bool:
    """Say whether a kernel attends here; otherwise the reference backend does."""
    if not layer.holds_codes or query.dtype not in _QUERY_TYPES or options.chunk is not None:
        return False
    if layer.v is None:
        plain = options.window is None and options.soft_cap is None and options.sinks is None
        return plain and layer.k.shape[-1] == ROW_DIM and layer.v_dim == LATENT_DIM
    widths = (layer.k.shape[-1], layer.v_dim)
    return all(width % _WIDTH_STEP == 0 and width <= _MAX_WIDTH for width in widths)


def _attend_mla(
    layer: LayerCache, query: Tensor, batch: Batch, options: AttentionOptions
) -> Tensor:
    page_table, seq_lens = batch.page_table, batch.seq_lens
    if not batch.is_decode:
        page_table = page_table.index_select(0, batch.token_sequences())
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
