"""The Triton kernel behind :mod:`fp8kv.kernels.gather`.

The output is cut into blocks of tokens that lie in one sequence each, a block into parts of as many vectors as a
program's threads take. A program finds its sequence in ``cu_seqlens`` by itself, so the grid needs no length from the
device, only an upper bound of their sum.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor, uint8

from fp8kv.kernels.cast import decodes_natively, plan_cast

# Tokens of one block. A sequence's last block is half empty on average.
_BLOCK_TOKENS = 64
# Elements whose values one thread stores as 16 bytes, such vectors of one program, and its warps.
_VECTOR = 8
_VECTORS = 256
_NUM_WARPS = 2


@triton.jit
def _find_sequence(cu_seqlens, block, batch, BLOCK_TOKENS: tl.constexpr):
    """Return the sequence that a block lies in, or ``batch`` for a block that is left over.

    Sequence b owns the blocks from ``cu_seqlens[b] // BLOCK_TOKENS + b`` on: that leaves each sequence enough of them,
    and grows with b, so the last start up to ``block`` is looked for, among 128 places at a time.
    """
    place = tl.arange(0, 128)
    sequence = 0
    places = batch + 1
    while places > 1:
        step = (places + 127) // 128
        index = sequence + place * step
        there = (place * step < places) & (index <= batch)
        start = tl.load(cu_seqlens + index, mask=there, other=0) // BLOCK_TOKENS + index
        sequence += (tl.sum((there & (start <= block)).to(tl.int32), 0) - 1) * step
        places = step
    return sequence


@triton.jit
def _decode(
    codes,
    NATIVE: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    E5M2: tl.constexpr,
    SIGNED_ZERO: tl.constexpr,
):
    """Return the float32 values of FP8 codes given as uint8; exact."""
    if NATIVE:
        if E5M2:
            values = codes.to(tl.float8e5, bitcast=True).to(tl.float32)
        else:
            values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        # Exponent and significand in their places in a float32, which is then too small by a power of two.
        bits = codes.to(tl.int32)
        magnitude = bits & 0x7F
        small = ((bits & 0x80) << 24) | (magnitude << (23 - MANTISSA_BITS))
        power = tl.full(codes.shape, (MIN_EXPONENT + 253) << 23, tl.int32)
        values = small.to(tl.float32, bitcast=True) * power.to(tl.float32, bitcast=True)
        if E5M2:
            values = tl.where(magnitude == 0x7C, values * float("inf"), values)
            is_nan = magnitude > 0x7C
        elif SIGNED_ZERO:
            is_nan = magnitude == 0x7F
        else:
            is_nan = bits == 0x80
        values = tl.where(is_nan, float("nan"), values)
    return values


@triton.jit
def _gather_part(
    cache,
    scale,
    out,
    stride_page,
    stride_token,
    stride_head,
    stride_out_token,
    stride_out_head,
    part,
    pages,
    row,
    position,
    tokens,
    FACTS: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    VECTORS: tl.constexpr,
    CAST: tl.constexpr,
):
    """Gather one part of a block, of K or of V: vectors counted through the heads of a token, then through the tokens.

    The block's tokens begin at ``position`` of the sequence and at ``row`` of the output. ``FACTS`` are the head's
    width, the elements of a vector and whether heads have scales of their own; ``CAST`` is what ``_decode`` takes.
    """
    VECTOR: tl.constexpr = FACTS[1]
    head_vectors: tl.constexpr = FACTS[0] // VECTOR
    vector = part * VECTORS + tl.arange(0, VECTORS)
    token = vector // (HEADS * head_vectors)
    head = vector // head_vectors % HEADS
    columns = (vector % head_vectors * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    exists = (token < tokens) & (token < BLOCK_TOKENS)
    page = tl.load(pages + (position + token) // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
    offset = (position + token) % PAGE_SIZE
    source = page * stride_page + offset * stride_token + head * stride_head
    codes = tl.load(cache + source[:, None] + columns, mask=exists[:, None])
    if FACTS[2]:
        factor = tl.load(scale + head)[:, None]
    else:
        factor = tl.load(scale)
    values = _decode(codes, CAST[0], CAST[1], CAST[2], CAST[3], CAST[4]) * factor
    target = (row + token).to(tl.int64) * stride_out_token + head * stride_out_head
    tl.store(out + target[:, None] + columns, values.to(out.dtype.element_ty), mask=exists[:, None])


@triton.jit(do_not_specialize=["batch", "total_tokens", "stride_table"])
def _gather_kernel(
    k_side,
    v_side,
    page_table,
    cu_seqlens,
    starts,
    batch,
    total_tokens,
    stride_table,
    K_FACTS: tl.constexpr,
    V_FACTS: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    VECTORS: tl.constexpr,
    K_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    CAST: tl.constexpr,
) -> None:
    block = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    sequence = _find_sequence(cu_seqlens, block, batch, BLOCK_TOKENS)
    if sequence >= batch:
        return
    begin = tl.load(cu_seqlens + sequence)
    end = tl.minimum(tl.load(cu_seqlens + sequence + 1), total_tokens)
    first = (block - begin // BLOCK_TOKENS - sequence) * BLOCK_TOKENS
    if begin + first >= end:
        return
    position = first
    if starts is not None:
        position += tl.load(starts + sequence)
    pages = page_table + sequence.to(tl.int64) * stride_table
    at = (pages, begin + first, position, end - begin - first)
    if v_side is None or part < K_PARTS:
        _gather_part(*k_side, part, *at, K_FACTS, HEADS, PAGE_SIZE, BLOCK_TOKENS, VECTORS, CAST)
    else:
        part -= K_PARTS
        _gather_part(*v_side, part, *at, V_FACTS, HEADS, PAGE_SIZE, BLOCK_TOKENS, VECTORS, CAST)


def launch_gather(
    sides: list[tuple[Tensor, Tensor, Tensor]],
    page_table: Tensor,
    cu_seqlens: Tensor,
    starts: Tensor | None,
) -> None:
    """Gather one cache, or K and V, in one launch; the arguments have been checked.

    Args:
        sides: a cache [pages, page_size, heads, dim], its scale and its output [total_tokens, heads, dim], once or twice.
        page_table: [batch, max_pages] int32.
        cu_seqlens: [batch + 1] int32.
        starts: [batch] int32, or ``None`` for 0.
    """
    cache, _, out = sides[0]
    batch, total_tokens = page_table.shape[0], out.shape[0]
    if batch == 0 or total_tokens == 0:
        return
    _, page_size, heads, _ = cache.shape
    arguments: list[tuple[object, ...] | None] = [None, None]
    facts: list[tuple[int, int, bool] | None] = [None, None]
    parts = [0, 0]
    for i, (cache, scale, out) in enumerate(sides):
        dim = cache.shape[3]
        vector = math.gcd(dim, _VECTOR)
        arguments[i] = (cache.view(uint8), scale, out, *cache.stride()[:3], *out.stride()[:2])
        facts[i] = (dim, vector, scale.numel() > 1)
        parts[i] = triton.cdiv(_BLOCK_TOKENS * heads * dim // vector, _VECTORS)
    plan = plan_cast(cache.dtype, cache.device)
    native = decodes_natively(cache.dtype, cache.device)
    blocks = total_tokens // _BLOCK_TOKENS + batch
    _gather_kernel[(blocks * sum(parts),)](
        *arguments,
        page_table,
        cu_seqlens,
        starts,
        batch,
        total_tokens,
        page_table.stride(0),
        K_FACTS=facts[0],
        V_FACTS=facts[1],
        HEADS=heads,
        PAGE_SIZE=page_size,
        BLOCK_TOKENS=_BLOCK_TOKENS,
        VECTORS=_VECTORS,
        K_PARTS=parts[0],
        PARTS=sum(parts),
        CAST=(native, plan.mantissa_bits, plan.min_exponent, plan.e5m2, plan.signed_zero),
        num_warps=_NUM_WARPS,
    )
