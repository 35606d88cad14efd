"""What the warps of a program of :mod:`fp8kv.kernels.hopper.decode_mla_large` do, for 64 heads, in tiles of 64 tokens.

wgmma multiplies no FP16 by FP8, and an FP8 query would cost two digits. So a tile is widened to FP16, which is exact, in
shared memory. There it serves three times: as K, and as V in two halves of 256 columns, since 64 x 256 float32 sums are
what the registers of one warp group hold. Three warp groups work side by side:

    widen         loads the codes of the next tile into registers, writes those of this one to shared memory as FP16
    attend_left   S = Q K^T; online softmax; hands over P and the factors of the sums; O[:, :256] += P V[:, :256]
    attend_right  O[:, 256:] += P V[:, 256:]

Queries fill 72 KiB of shared memory and two tiles 144, so there is room for no third. The halves of a tile are filled
and released apart, which lets the first be refilled while the second is in use.

Softmax after Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); the tiling of FlashAttention.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

# P is 2^14 times the weight relative to the running maximum: of the powers of two the last but one that FP16 holds.
# At 2^0, tokens 10 logits below an attention sink would fall among FP16's subnormal numbers and lose digits.
_P_EXPONENT = gl.constexpr(14.0)
# Queries are brought to 2^14 .. 2^15 by a power of two for each head, so that no bit of bfloat16 is lost in FP16.
_Q_EXPONENT = gl.constexpr(14)

_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
_SUM_ROWS = gl.constexpr(gl.SliceLayout(1, _SUMS.value))
_SCORE_ROWS = gl.constexpr(gl.SliceLayout(1, _SCORES.value))


@gluon.jit
def widen(pages, tokens, tile, filled, released) -> None:
    """Bring the tiles to shared memory in FP16, the last tile first: it alone may be partial."""
    cache, table, page_shift, page_mask, stride_page, stride_row = pages
    start, end, tiles = tokens
    left, right, rope = tile
    left_full, right_full = filled
    left_empty, right_empty = released
    # Words of four codes. Four lanes read 64 bytes of a row, and a warp eight rows: then the FP16 numbers of every eight
    # lanes, two rows of a swizzled tile, lie in 32 different banks.
    words: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    rows = gl.arange(0, 64, gl.SliceLayout(1, words))
    columns = gl.arange(0, 64, gl.SliceLayout(0, words))[None, :]
    rope_columns = gl.arange(0, 16, gl.SliceLayout(0, words))[None, :] + 128
    e5m2: gl.constexpr = cache.dtype.element_ty == gl.float8e5
    cache = cache.to(gl.pointer_type(gl.int32), bitcast=True)
    stride_page = stride_page // 4
    stride_row = stride_row // 4

    # Rows past the end repeat the last token, whose page is known and whose numbers are finite; P is 0 there.
    place = gl.minimum(start + (tiles - 1) * 64 + rows, end - 1)
    page = gl.load(table + (place >> page_shift))
    base = cache + _offsets(page, place, page_mask, stride_page, stride_row)[:, None]
    left_codes = gl.load(base + columns)
    rope_codes = gl.load(base + rope_columns)
    right_codes = gl.load(base + (columns + 64))
    place = gl.minimum(start + rows, end - 1)
    page = gl.load(table + (place >> page_shift))
    for index in range(tiles):
        stage = index & 1
        parity = (index >> 1) & 1
        mbarrier.wait(left_empty.index(stage), parity ^ 1)
        _as_words(left.index(stage)).store(_to_half(left_codes, e5m2))
        _as_words(rope.index(stage)).store(_to_half(rope_codes, e5m2))
        fence_async_shared()
        mbarrier.arrive(left_full.index(stage), count=1)
        # Loads follow the fence, which would wait for them. After the last tile they fetch one that nobody uses.
        base = cache + _offsets(page, place, page_mask, stride_page, stride_row)[:, None]
        left_codes = gl.load(base + columns)
        rope_codes = gl.load(base + rope_columns)
        mbarrier.wait(right_empty.index(stage), parity ^ 1)
        _as_words(right.index(stage)).store(_to_half(right_codes, e5m2))
        fence_async_shared()
        mbarrier.arrive(right_full.index(stage), count=1)
        # The page table is read a tile ahead: its latency would be in the way of every tile.
        place = gl.minimum(start + (index + 1) * 64 + rows, end - 1)
        page = gl.load(table + (place >> page_shift))
        right_codes = gl.load(base + (columns + 64))


@gluon.jit
def attend_left(
    queries, scales, tokens, tile, filled, released, handed_over, outputs, PDL: gl.constexpr
) -> None:
    """Compute scores and softmax, and the output's first 256 columns."""
    query, stride_query_head, q_tile = queries
    score_scale, value_scale = scales
    start, end, tiles = tokens
    left, right, rope = tile
    left_full, right_full = filled
    left_empty, _right_empty = released
    p_tile, factors, p_full, p_empty = handed_over
    result, log_sum = outputs
    _out, heads, _stride_out_head = result
    q_left, q_right, q_rope = q_tile
    operand: gl.constexpr = gl.DotOperandLayout(0, _SUMS, 2)

    unit = _load_queries(query, heads, stride_query_head, q_tile)
    unit = gl.convert_layout(unit, _SCORE_ROWS) * score_scale
    fence_async_shared()
    last_tile = end - start - (tiles - 1) * 64
    columns = gl.arange(0, 64, gl.SliceLayout(0, _SCORES))[None, :]
    peak = gl.full([64], float("-inf"), gl.float32, _SCORE_ROWS)
    total = gl.zeros([64], gl.float32, _SCORE_ROWS)
    sums = gl.zeros([64, 256], gl.float32, _SUMS)
    for index in range(tiles):
        stage = index & 1
        parity = (index >> 1) & 1
        mbarrier.wait(left_full.index(stage), parity)
        scores = gl.zeros([64, 64], gl.float32, _SCORES)
        scores = _multiply_transposed(q_left, left.index(stage), scores, False)
        scores = _multiply_transposed(q_rope, rope.index(stage), scores, True)
        mbarrier.wait(right_full.index(stage), parity)
        scores = _multiply_transposed(q_right, right.index(stage), scores, True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        if index == 0:
            scores = gl.where(columns < last_tile, scores, float("-inf"))
        new_peak = gl.maximum(peak, gl.max(scores, 1) * unit)
        factor = gl.exp2(peak - new_peak)
        peak = new_peak
        sums = sums * gl.convert_layout(factor, _SUM_ROWS)[:, None]
        weights = gl.exp2(scores * unit[:, None] - (new_peak - _P_EXPONENT)[:, None])
        p = weights.to(gl.float16)
        p_operand = gl.convert_layout(p, operand)
        sums = warpgroup_mma(p_operand, left.index(stage), sums, is_async=True)
        # While that runs, P goes to the other warp group.
        mbarrier.wait(p_empty, (index & 1) ^ 1)
        p_tile.store(p)
        factors.store(factor)
        fence_async_shared()
        mbarrier.arrive(p_full, count=1)
        total = total * factor + gl.sum(weights, 1)
        sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(left_empty.index(stage), count=1)

    if PDL:
        gdc_launch_dependents()
    norm = value_scale / total
    mbarrier.wait(p_empty, (tiles & 1) ^ 1)
    factors.store(norm)
    mbarrier.arrive(p_full, count=1)
    _store_log_sum(peak - _P_EXPONENT + gl.log2(total), heads, log_sum)
    _store_half(sums * gl.convert_layout(norm, _SUM_ROWS)[:, None], result, 0)


@gluon.jit
def attend_right(tokens, tile, released, handed_over, result) -> None:
    """Compute the output's last 256 columns from the weights that ``attend_left`` hands over."""
    _start, _end, tiles = tokens
    _left, right, _rope = tile
    _left_empty, right_empty = released
    p_tile, factors, p_full, p_empty = handed_over
    sums = gl.zeros([64, 256], gl.float32, _SUMS)
    for index in range(tiles):
        stage = index & 1
        mbarrier.wait(p_full, index & 1)
        sums = sums * factors.load(_SUM_ROWS)[:, None]
        sums = warpgroup_mma(p_tile, right.index(stage), sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(p_empty, count=1)
        mbarrier.arrive(right_empty.index(stage), count=1)
    # After the last tile the factors are the norms.
    mbarrier.wait(p_full, tiles & 1)
    _store_half(sums * factors.load(_SUM_ROWS)[:, None], result, 256)


@gluon.jit
def write_empty_split(result, log_sum, splits) -> None:
    """Write what a split without tokens leaves: a log-sum-exp of -inf, and zeros where no stage 2 follows."""
    _out, heads, _stride_out_head = result
    rows: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    _store_log_sum(gl.full([64], float("-inf"), gl.float32, rows), heads, log_sum)
    if splits == 1:
        zeros = gl.zeros([64, 256], gl.float32, _SUMS)
        _store_half(zeros, result, 0)
        _store_half(zeros, result, 256)


@gluon.jit
def _offsets(page, place, page_mask, stride_page, stride_row):
    return page.to(gl.int64) * stride_page + (place & page_mask).to(gl.int64) * stride_row


@gluon.jit
def _as_words(half_tile):
    shape: gl.constexpr = [half_tile.shape[0], half_tile.shape[1] // 2]
    return half_tile._reinterpret(gl.int32, shape, gl.NVMMASharedLayout(128, 32, 2))


@gluon.jit
def _to_half(codes, e5m2: gl.constexpr):
    """Turn words of four codes into twice as many words of two FP16 numbers."""
    # In this form the compiler keeps codes in whole registers; FP8 tensors cost it one register for each code.
    if e5m2:
        low, high = gl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2;"
            " cvt.rn.f16x2.e5m2x2 $0, l; cvt.rn.f16x2.e5m2x2 $1, h; }",
            "=r,=r,r", [codes], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low, high = gl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2;"
            " cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }",
            "=r,=r,r", [codes], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return gl.join(low, high).reshape([codes.shape[0], codes.shape[1] * 2])


@gluon.jit
def _multiply_transposed(a, b, sums, use_sums: gl.constexpr):
    return warpgroup_mma(a, b.permute((1, 0)), sums, use_acc=use_sums, is_async=True)


@gluon.jit
def _load_queries(query, heads, stride_query_head, q_tile):
    """Write the queries to shared memory in FP16 and return what one unit of each row is worth."""
    q_left, q_right, q_rope = q_tile
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    columns = gl.arange(0, 256, gl.SliceLayout(0, layout))[None, :]
    rope_columns = gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :] + 512
    exists = rows < heads
    query += rows * stride_query_head
    # All loads come before the first use, so that their latencies overlap.
    left = gl.load(query + columns, mask=exists, other=0.0)
    right = gl.load(query + (columns + 256), mask=exists, other=0.0)
    rope = gl.load(query + rope_columns, mask=exists, other=0.0)
    peak = gl.maximum(gl.maximum(_peak(left), _peak(right)), _peak(rope))
    # The exponent of the row's largest number, from its bits; a row below 2^-112 needs no further care.
    exponent = gl.maximum(peak.to(gl.int32, bitcast=True) >> 23, _Q_EXPONENT + 1)
    up = ((254 + _Q_EXPONENT - exponent) << 23).to(gl.float32, bitcast=True)[:, None]
    q_left.store((left.to(gl.float32) * up).to(gl.float16))
    q_right.store((right.to(gl.float32) * up).to(gl.float16))
    q_rope.store((rope.to(gl.float32) * up).to(gl.float16))
    return ((exponent - _Q_EXPONENT) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _peak(values):
    return gl.max(gl.abs(values.to(gl.float32)), 1)


@gluon.jit
def _store_log_sum(value, heads, log_sum):
    lse, stride_lse_head, lse_unit = log_sum
    if lse is not None:
        rows = gl.arange(0, 64, value.type.layout)
        gl.store(lse + rows * stride_lse_head, value * lse_unit, mask=rows < heads)


@gluon.jit
def _store_half(sums, result, first: gl.constexpr):
    out, heads, stride_out_head = result
    rows = gl.arange(0, 64, _SUM_ROWS)[:, None]
    columns = gl.arange(0, 256, gl.SliceLayout(0, _SUMS))[None, :] + first
    place = out + rows * stride_out_head + columns
    gl.store(place, sums.to(out.dtype.element_ty), mask=rows < heads)
