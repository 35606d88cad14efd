"""Rows of the cache of multi-head latent attention: latent and rope part quantised and written in one launch.

Contract: the row of slot ``slots[t]`` holds the codes of ``[latent[t] | rope[t]]``, both divided by the one scale; a
negative slot is skipped; no other byte of the cache changes. Where two tokens name one slot, either may win. Codes
are those of :func:`fp8kv.kernels.quantize.quantize`, bit for bit. An unquantised cache, of the inputs' own 16-bit dtype,
takes the values as they are.

Floor: bytes read and written, 3 per cached element, and 8 per slot. All work is cut into chunks of 16 elements, which
a thread loads and stores in whole 16-byte accesses: a row is 36 chunks, so no thread idles although its width is no
power of two. Few tokens are bound by the latency of one load; ``pdl`` hides what lies before it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fp8kv.kernels.arguments import (
    FLOAT_TYPES,
    FP8_TYPES,
    INDEX_TYPES,
    require,
    require_cache_dtype,
    require_dtype,
    require_same_device,
    require_scale,
    require_shape,
    require_unit_stride,
)
from fp8kv.kernels.cast import plan_write
from fp8kv.kernels.layout import is_page_size, kernel_view
from fp8kv.kernels.pdl import launch_options, uses_pdl
from fp8kv.kernels.quantize import invert, reference_quantize, to_codes


def reference_mla_pack(
    latent: Tensor, rope: Tensor, cache: Tensor, slots: Tensor, scale: Tensor, *, pdl: bool = False
) -> None:
    """Do what :func:`mla_pack` does, in plain torch."""
    tokens, page_size = slots.shape[0], cache.shape[1]
    row = torch.cat([latent[:tokens], rope[:tokens].flatten(1)], dim=-1)
    if cache.dtype in FP8_TYPES:
        row = reference_quantize(row, scale, dtype=cache.dtype)
    kept = slots >= 0
    wanted = slots[kept].long()
    kernel_view(cache)[wanted // page_size, wanted % page_size] = kernel_view(row)[kept]


@triton.jit(do_not_specialize=["tokens"])
def _row_kernel(
    latent,
    rope,
    cache,
    slots,
    scale,
    tokens,
    stride_latent,
    stride_rope,
    stride_page,
    stride_offset,
    PAGE_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    LATENT_CHUNKS: tl.constexpr,
    ROW_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    CAST: tl.constexpr,
) -> None:
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = index // ROW_CHUNKS
    chunk = index % ROW_CHUNKS
    exists = token < tokens
    token64 = token.to(tl.int64)
    is_latent = chunk < LATENT_CHUNKS
    from_latent = latent + (token64 * stride_latent + chunk * CHUNK)
    from_rope = rope + (token64 * stride_rope + (chunk - LATENT_CHUNKS) * CHUNK)
    lane = tl.arange(0, CHUNK)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(slots + token, mask=exists, other=-1).to(tl.int64)
    latents = tl.load(from_latent[:, None] + lane, mask=(exists & is_latent)[:, None])
    ropes = tl.load(from_rope[:, None] + lane, mask=(exists & ~is_latent)[:, None])
    values = tl.where(is_latent[:, None], latents, ropes)
    if CAST is not None:
        values = to_codes(values, invert(tl.load(scale)), CAST)
    # PAGE_SIZE is a power of two, and a negative slot is masked, whatever its quotient.
    page = slot // PAGE_SIZE
    place = page * stride_page + (slot % PAGE_SIZE) * stride_offset + chunk * CHUNK
    tl.store((cache + place)[:, None] + lane, values, mask=(slot >= 0)[:, None])


def mla_pack(
    latent: Tensor, rope: Tensor, cache: Tensor, slots: Tensor, scale: Tensor, *, pdl: bool = False
) -> None:
    """Write latents and rope parts to their slots, quantised unless the cache is not.

    Args:
        latent: [>=tokens, latent_dim], bfloat16, float16 or float32, last stride 1; rows from ``tokens`` on are padding
            and left unread.
        rope: [>=tokens, rope_dim] or [>=tokens, 1, rope_dim], rotated, dtype of ``latent``, last stride 1.
        cache: [pages, page_size, latent_dim + rope_dim], FP8, or bfloat16 or float16 as ``latent``, last stride 1.
        slots: [tokens], int32 or int64, ``page * page_size + offset``; negative to skip the token. Slots lie on the
            device and are not checked against the size of the cache.
        scale: float32, one element: V is the latent part of the same row, so there is one scale for both. Not read where
            the cache is unquantised.
        pdl: start while the kernel in front ends (:mod:`fp8kv.kernels.pdl`).

    Raises:
        KernelArgumentError: an argument's shape, dtype, device or stride does not fit.
    """
    if rope.dim() == 3:
        require_shape("rope", rope, (None, 1, None))
        rope = rope[:, 0]
    _check_pack(latent, rope, cache, slots, scale)
    tokens = slots.shape[0]
    if tokens == 0:
        return
    # Few tokens are bound by latency: less work for a thread, and more programs.
    largest, block, num_warps = (8, 64, 2) if tokens <= 512 else (16, 128, 4)
    chunk = math.gcd(largest, latent.shape[1], rope.shape[1])
    row_chunks = cache.shape[2] // chunk
    overlaps = uses_pdl(pdl, latent.device)
    _row_kernel[(triton.cdiv(tokens * row_chunks, block),)](
        latent,
        rope,
        kernel_view(cache),
        slots,
        scale,
        tokens,
        latent.stride(0),
        rope.stride(0),
        cache.stride(0),
        cache.stride(1),
        PAGE_SIZE=cache.shape[1],
        CHUNK=chunk,
        LATENT_CHUNKS=latent.shape[1] // chunk,
        ROW_CHUNKS=row_chunks,
        BLOCK=block,
        PDL=overlaps,
        num_warps=num_warps,
        CAST=plan_write(cache),
        **launch_options(overlaps),
    )


def _check_pack(latent: Tensor, rope: Tensor, cache: Tensor, slots: Tensor, scale: Tensor) -> None:
    require_scale("scale", scale, None)
    require_same_device(latent=latent, rope=rope, cache=cache, slots=slots, scale=scale)
    require_shape("slots", slots, (None,))
    require_shape("latent", latent, (None, None))
    require_shape("rope", rope, (None, None))
    require_shape("cache", cache, (None, None, latent.shape[1] + rope.shape[1]))
    tokens = slots.shape[0]
    require(latent.shape[0] >= tokens, "the rows of latent", latent.shape[0], f"at least {tokens}")
    require(rope.shape[0] >= tokens, "the rows of rope", rope.shape[0], f"at least {tokens}")
    require(is_page_size(cache.shape[1]), "the page size", cache.shape[1], "a power of two to 256")
    require_dtype("latent", latent, FLOAT_TYPES)
    require_dtype("rope", rope, (latent.dtype,))
    require_cache_dtype("cache", cache, latent)
    require_dtype("slots", slots, INDEX_TYPES)
    for name, tensor in (("latent", latent), ("rope", rope), ("cache", cache), ("slots", slots)):
        require_unit_stride(name, tensor)
