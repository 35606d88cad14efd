"""Quantise new keys and values and write them into their pages, K and V in one launch.

Contract: token t goes to slot ``slots[t]``, that is to row ``slot % page_size`` of page ``slot // page_size``, as
``round(clamp(x / scale))``. With a slot map (a sliding-window pool beside the full one) the slot is
``slot_map[slots[t]]``. A negative slot is padding and is skipped, before the map is read as well as after. Two tokens
must not share a slot. What no slot names keeps its bytes.

An unquantised cache, of the inputs' own 16-bit dtype, takes the values as they are and has no scales.

Floor: 2 bytes read (of 16-bit types) and 1 written for each element. A thread takes 16 neighbours in two loads of 16
bytes, which do not wait for the slot, and writes them in one store; half of the grid takes K, the other half V.
"""

from __future__ import annotations

import math
from dataclasses import astuple

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
from fp8kv.kernels.cast import divide, encode, plan_write
from fp8kv.kernels.fp8 import format_of, quantize
from fp8kv.kernels.layout import MAX_PAGE_SIZE, is_page_size, kernel_view
from fp8kv.kernels.pdl import launch_options, uses_pdl

# Elements that one thread turns into one store of 16 bytes.
_VECTOR = 16
# Such vectors of one program: one for each of its threads.
_VECTORS = 128
# Vectors are counted in int32, the idle ones of the last program included.
_MOST_VECTORS = 2**31 - _VECTORS


def reference_cache_write(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    slot_map: Tensor | None = None,
) -> None:
    """Do what :func:`cache_write` does, in plain torch."""
    targets = slots.long()
    tokens = (targets >= 0).nonzero().flatten()
    if slot_map is not None:
        targets = targets.clone()
        targets[tokens] = slot_map[targets[tokens]].long()
        tokens = (targets >= 0).nonzero().flatten()
    targets = targets[tokens]
    page_size = k_cache.shape[1]
    for source, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        stored = source[tokens]
        if cache.dtype in FP8_TYPES:
            stored = quantize(stored, scale.reshape(-1, 1), format_of(cache.dtype))
        kernel_view(cache)[targets // page_size, targets % page_size] = kernel_view(stored)


@triton.jit
def _write(
    source,
    cache,
    scale,
    stride_source_token,
    stride_source_head,
    stride_page,
    stride_token,
    stride_head,
    slots,
    slot_map,
    num_tokens,
    FACTS: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    VECTORS: tl.constexpr,
    PDL: tl.constexpr,
    CAST: tl.constexpr,
):
    """Write one program's vectors of K or of V, counted through the heads of a token, then through the tokens.

    ``FACTS`` are the head's width, the elements of a vector and whether heads have scales of their own; ``CAST`` is a
    :class:`~fp8kv.kernels.cast.CastPlan` as a tuple, or None where values are written as they are.
    """
    VECTOR: tl.constexpr = FACTS[1]
    head_vectors: tl.constexpr = FACTS[0] // VECTOR
    vector = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    token = vector // (HEADS * head_vectors)
    head = vector // head_vectors % HEADS
    columns = (vector % head_vectors * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    start = token.to(tl.int64) * stride_source_token + head * stride_source_head
    exists = token < num_tokens
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # Nothing that the values need waits for the slot.
    slot = tl.load(slots + token, mask=exists, other=-1).to(tl.int64)
    values = tl.load(source + start[:, None] + columns, mask=exists[:, None])
    if CAST is not None:
        if FACTS[2]:
            divisor = tl.load(scale + head)[:, None]
        else:
            divisor = tl.load(scale)
    if slot_map is not None:
        slot = tl.load(slot_map + slot, mask=slot >= 0, other=-1).to(tl.int64)
    if CAST is not None:
        quotient = divide(values.to(tl.float32), divisor, tl.div_rn(1.0, divisor), CAST[1])
        values = encode(quotient, CAST[0], CAST[2], CAST[3], CAST[4], CAST[5], CAST[6], CAST[7])
    place = slot // PAGE_SIZE * stride_page + slot % PAGE_SIZE * stride_token + head * stride_head
    tl.store(cache + place[:, None] + columns, values, mask=(slot >= 0)[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _cache_write_kernel(
    k_side,
    v_side,
    slots,
    slot_map,
    num_tokens,
    K_FACTS: tl.constexpr,
    V_FACTS: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    VECTORS: tl.constexpr,
    PDL: tl.constexpr,
    CAST: tl.constexpr,
) -> None:
    places = (slots, slot_map, num_tokens)
    if tl.program_id(1) == 0:
        _write(*k_side, *places, K_FACTS, HEADS, PAGE_SIZE, VECTORS, PDL, CAST)
    else:
        _write(*v_side, *places, V_FACTS, HEADS, PAGE_SIZE, VECTORS, PDL, CAST)


def cache_write(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    slot_map: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Write new keys and values into a paged cache, as FP8 codes unless it is unquantised.

    Slots, map and scales are read on the device: all may change between replays of a CUDA graph.

    Args:
        key: [tokens or more, kv_heads, k_dim] bfloat16, float16 or float32, after RoPE; any strides but the last, so
            a slice of a fused QKV tensor will do. Rows beyond ``slots`` are padding.
        value: [tokens or more, kv_heads, v_dim], of the dtype of ``key``; any strides but the last.
        k_cache: [pages, page_size, kv_heads, k_dim] FP8, or bfloat16 or float16 as ``key``; changed in place. Any strides
            but the last: the transposed view of a cache ordered [pages, kv_heads, page_size, k_dim] will do.
        v_cache: [pages, page_size, kv_heads, v_dim], of the dtype of ``k_cache``.
        slots: [tokens] int32 or int64, ``page * page_size + offset``; negative for padding. Slots past the cache are
            the caller's fault and are not looked for.
        k_scale: float32, one element or [kv_heads]; value = code * scale. Not read where the cache is unquantised.
        v_scale: the same for V.
        slot_map: int32 or int64, from a slot of the full pool to one of this pool; negative where it has none.
        pdl: start while the kernel in front ends (:mod:`fp8kv.kernels.pdl`).

    Raises:
        KernelArgumentError: an argument's shape, dtype, device or stride does not fit.
    """
    check_cache_write(key, value, k_cache, v_cache, slots, k_scale, v_scale, slot_map)
    num_tokens = slots.shape[0]
    if num_tokens == 0:
        return
    _, page_size, heads, k_dim = k_cache.shape
    v_dim = v_cache.shape[3]
    facts = [
        (dim, math.gcd(dim, _VECTOR), scale.numel() > 1)
        for dim, scale in ((k_dim, k_scale), (v_dim, v_scale))
    ]
    vectors = num_tokens * heads * max(dim // vector for dim, vector, _ in facts)
    require(vectors < _MOST_VECTORS, "the vectors of key", vectors, f"below {_MOST_VECTORS}")
    overlaps = uses_pdl(pdl, k_cache.device)
    plan = plan_write(k_cache)
    _cache_write_kernel[(triton.cdiv(vectors, _VECTORS), 2)](
        (key, kernel_view(k_cache), k_scale, *key.stride()[:2], *k_cache.stride()[:3]),
        (value, kernel_view(v_cache), v_scale, *value.stride()[:2], *v_cache.stride()[:3]),
        slots,
        slot_map,
        num_tokens,
        K_FACTS=facts[0],
        V_FACTS=facts[1],
        HEADS=heads,
        PAGE_SIZE=page_size,
        VECTORS=_VECTORS,
        PDL=overlaps,
        CAST=astuple(plan) if plan is not None else None,
        num_warps=_VECTORS // 32,
        **launch_options(overlaps),
    )


def check_cache_write(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    slot_map: Tensor | None,
) -> None:
    """Check what is written and where, as :func:`cache_write` describes it.

    Raises:
        KernelArgumentError: an argument's shape, dtype, device or stride does not fit.
    """
    require_cache_dtype("k_cache", k_cache, key)
    require_shape("k_cache", k_cache, (None, None, None, None))
    pages, page_size, heads, k_dim = k_cache.shape
    powers = f"a power of two up to {MAX_PAGE_SIZE}"
    require(is_page_size(page_size), "the page size of k_cache", page_size, powers)
    require_dtype("v_cache", v_cache, (k_cache.dtype,))
    require_shape("v_cache", v_cache, (pages, page_size, heads, None))
    require_dtype("key", key, FLOAT_TYPES)
    require_shape("key", key, (None, heads, k_dim))
    require_dtype("value", value, (key.dtype,))
    require_shape("value", value, (None, heads, v_cache.shape[3]))
    require_dtype("slots", slots, INDEX_TYPES)
    require_shape("slots", slots, (None,))
    for name, rows in (("key", key), ("value", value)):
        enough = f"at least {slots.shape[0]}, the length of slots"
        require(rows.shape[0] >= slots.shape[0], f"the length of {name}", rows.shape[0], enough)
    require_scale("k_scale", k_scale, heads)
    require_scale("v_scale", v_scale, heads)
    if slot_map is not None:
        require_dtype("slot_map", slot_map, INDEX_TYPES)
        require_shape("slot_map", slot_map, (None,))
        require_unit_stride("slot_map", slot_map)
    for name, tensor in (
        ("key", key),
        ("value", value),
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        ("slots", slots),
    ):
        require_unit_stride(name, tensor)
    require_same_device(
        key=key,
        value=value,
        k_cache=k_cache,
        v_cache=v_cache,
        slots=slots,
        k_scale=k_scale,
        v_scale=v_scale,
        slot_map=slot_map,
    )
