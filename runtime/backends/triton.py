"""The Triton backend: fp8kv's kernels over a paged cache, without a look at the device, so that graphs can capture it.

What goes where is decided by :func:`has_kernel`, from shapes and types alone:

* Grouped-query attention: sequences of one new token, which stand first in a batch, go through ``decode_gqa``, the
  others through ``extend``. Rotation, quantisation and write are one launch, ``rope_cache_write``.
* MLA of 512 + 64 columns: see :mod:`fp8kv.runtime.backends.triton_mla`.
* Caches of codes, and of 16-bit numbers (``bf16``, ``emulate``) where the model computes in the same, go through the
  same kernels, so that a comparison of the two is one of caches.
* All else is the reference backend's: ``float32`` caches, chunked attention, widths that no kernel takes, and float32
  queries, which the kernels would round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8kv.kernels.cache_write import cache_write
from fp8kv.kernels.decode_gqa import decode_gqa
from fp8kv.kernels.decode_mla import LATENT_DIM, ROW_DIM
from fp8kv.kernels.extend import extend
from fp8kv.kernels.mla_pack import mla_pack
from fp8kv.kernels.rope_cache_write import rope_cache_write
from fp8kv.runtime.backends import triton_mla
from fp8kv.runtime.backends.base import AttentionOptions, PreparedQkv, Rope
from fp8kv.runtime.backends.parts import BatchParts
from fp8kv.runtime.backends.reference import ReferenceBackend, encode
from fp8kv.runtime.batch import Batch
from fp8kv.runtime.latent_projection import LatentProjection
from fp8kv.runtime.paged_cache import LayerCache

_QUERY_TYPES = (torch.bfloat16, torch.float16)
_WIDTH_STEP = 16
_MAX_WIDTH = 256


class TritonBackend:
    """Attention by Triton kernels; see :class:`~fp8kv.runtime.backends.base.Backend` for the contract."""

    def __init__(self) -> None:
        """Make a backend; all that it keeps between calls is how the last batch was cut."""
        self._reference = ReferenceBackend()
        self._parts = BatchParts()

    @property
    def name(self) -> str:
        """The name by which users choose it."""
        return "triton"

    def write(self, layer: LayerCache, key: Tensor, value: Tensor, batch: Batch) -> None:
        """Write new tokens to their slots; codes equal the reference backend's, bit for bit."""
        if layer.mode == "emulate":
            key, value = encode(key, layer, layer.k_scale), encode(value, layer, layer.v_scale)
        if not _writes(layer, key):
            self._reference.write(layer, key, value, batch)
        elif layer.v is None:
            mla_pack(key, value, layer.k, batch.slots, layer.k_scale)
        else:
            cache_write(key, value, layer.k, layer.v, batch.slots, layer.k_scale, layer.v_scale)

    def fuses_rope(self, layer: LayerCache) -> bool:
        """Rotation joins the write of K and V; MLA's rope parts are rotated by the model."""
        return layer.v is not None and layer.mode not in ("emulate", "float32")

    def prepare_prefill_qkv(
        self,
        layer: LayerCache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch: Batch,
        rope: Rope | None = None,
    ) -> PreparedQkv:
        """Rotate, quantise and write in one launch; attention reads all of K and V from the cache."""
        if rope is None:
            self.write(layer, key, value, batch)
        elif layer.v is not None and layer.mode != "emulate" and _writes(layer, key):
            query = rope_cache_write(
                query,
                key,
                value,
                *rope,
                layer.k,
                layer.v,
                batch.slots,
                layer.k_scale,
                layer.v_scale,
            )
        else:
            return self._reference.prepare_prefill_qkv(layer, query, key, value, batch, rope)
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
        if not has_kernel(layer, query, options):
            return self._reference.attend(layer, query, batch, options, key, value)
        if layer.v is None:
            if key is not None and not batch.is_decode:
                # kernels read latents from the cache alone; attend_latents has K and V to expand
                return self._reference.attend(layer, query, batch, options, key, value)
            return triton_mla.attend_absorbed(layer, query, batch, options)
        out = query.new_empty(*query.shape[:2], layer.v_dim)
        first, (decodes, prefills) = batch.num_decodes, self._parts.of(batch)
        if decodes is not None:
            _decode(layer, layer.v, query[:first], decodes, options, out[:first])
        if prefills is not None:
            new = None if key is None or value is None else (key[first:], value[first:])
            _extend(layer, query[first:], new, prefills, options, out[first:])
        return out

    def attend_latents(
        self,
        layer: LayerCache,
        query: Tensor,
        batch: Batch,
        options: AttentionOptions,
        projection: LatentProjection,
        key: Tensor | None = None,
        value: Tensor | None = None,
    ) -> Tensor:
        """Attend absorbed where few tokens are new, and with K and V expanded where many are."""
        if not has_kernel(layer, query, options):
            latents = self._reference.attend(
                layer, projection.absorb(query), batch, options, key, value
            )
            return projection.to_values(latents)
        new = None if key is None or value is None else torch.cat((key, value), dim=-1)
        parts = self._parts.of(batch)
        return triton_mla.attend_latents(layer, query, batch, parts, options, projection, new)


def has_kernel(layer: LayerCache, query: Tensor, options: AttentionOptions) -> bool:
    """Say whether a kernel attends here; otherwise the reference backend does."""
    if query.dtype not in _QUERY_TYPES or options.chunk is not None:
        return False
    if not layer.holds_codes and layer.k.dtype != query.dtype:
        return False
    if layer.v is None:
        plain = options.window is None and options.soft_cap is None and options.sinks is None
        return plain and layer.k.shape[-1] == ROW_DIM and layer.v_dim == LATENT_DIM
    widths = (layer.k.shape[-1], layer.v_dim)
    return all(width % _WIDTH_STEP == 0 and 0 < width <= _MAX_WIDTH for width in widths)


def _writes(layer: LayerCache, key: Tensor) -> bool:
    """Say whether a kernel writes ``key`` and its value: as codes, or as they are."""
    return layer.holds_codes or (key.dtype == layer.k.dtype and key.dtype in _QUERY_TYPES)


def _decode(
    layer: LayerCache,
    v_cache: Tensor,
    query: Tensor,
    batch: Batch,
    options: AttentionOptions,
    out: Tensor,
) -> None:
    decode_gqa(
        query,
        layer.k,
        v_cache,
        batch.page_table,
        batch.seq_lens,
        layer.k_scale,
        layer.v_scale,
        sm_scale=options.scaling,
        max_seq_len=batch.max_seq_len,
        window=options.window,
        soft_cap=options.soft_cap,
        sinks=options.sinks,
        out=out,
    )


def _extend(
    layer: LayerCache,
    query: Tensor,
    new: tuple[Tensor, Tensor] | None,
    batch: Batch,
    options: AttentionOptions,
    out: Tensor,
) -> None:
    key, value = new if new is not None else (None, None)
    extend(
        query,
        key,
        value,
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
        sinks=options.sinks,
        out=out,
    )
