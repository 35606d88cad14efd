"""What :mod:`fp8kv.kernels.hopper.decode_mla_small_kernel` does with one tile of tokens, and with the query before the first.

Device functions; they know nothing of splits and stages.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

# P is 2^14 times the probability relative to the running maximum, so that tokens far below an attention sink are no
# subnormal numbers in FP16.
P_EXPONENT = gl.constexpr(14.0)


@gluon.jit
def load_query(query, heads, stride_head, MMA: gl.constexpr, HEADS: gl.constexpr):
    """Return Q as FP16 operands, [4, heads, 128] and [4, heads, 16], and what its rows must be multiplied by."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    rope_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    operand: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    head = gl.arange(0, HEADS, gl.SliceLayout(1, layout))
    column = gl.arange(0, 512, gl.SliceLayout(0, layout))
    place = query + head.to(gl.int64)[:, None] * stride_head + column[None, :]
    latent = gl.load(place, mask=(head < heads)[:, None], other=0.0).to(gl.float32)
    head = gl.arange(0, HEADS, gl.SliceLayout(1, rope_layout))
    column = 512 + gl.arange(0, 64, gl.SliceLayout(0, rope_layout))
    place = query + head.to(gl.int64)[:, None] * stride_head + column[None, :]
    rope = gl.load(place, mask=(head < heads)[:, None], other=0.0).to(gl.float32)
    largest = gl.convert_layout(gl.max(gl.abs(rope), 1), gl.SliceLayout(1, layout))
    largest = gl.maximum(gl.max(gl.abs(latent), 1), largest)
    # A power of two brings the row's largest element near 2^15: BF16 turns into FP16 without losing a bit.
    exponent = gl.minimum(268 - (largest.to(gl.int32, bitcast=True) >> 23), 253)
    grow = (exponent << 23).to(gl.float32, bitcast=True)
    shrink = ((254 - exponent) << 23).to(gl.float32, bitcast=True)
    latent = (latent * grow[:, None]).to(gl.float16)
    rope = (rope * gl.convert_layout(grow, gl.SliceLayout(1, rope_layout))[:, None]).to(gl.float16)
    # The same permutations as K's in partial_scores.
    latent = latent.reshape([HEADS, 4, 4, 2, 4, 2, 2]).permute([1, 0, 3, 4, 5, 2, 6])
    rope = rope.reshape([HEADS, 4, 4, 2, 2]).permute([1, 0, 3, 2, 4])
    latent = gl.convert_layout(latent.reshape([4, HEADS, 128]), operand)
    return latent, gl.convert_layout(rope.reshape([4, HEADS, 16]), operand), shrink


@gluon.jit
def partial_scores(latent_query, rope_query, latents, ropes, MMA: gl.constexpr):
    """Return four partial sums of Q K^T, [4, heads, tokens]: quarter w of the columns in warps w."""
    tokens: gl.constexpr = latents.shape[0]
    operand: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    # A thread of a matrix operand holds columns 2t, 2t + 1, 2t + 8 and 2t + 9. It gets four neighbours, the axes
    # (t, half, pair) turned into (half, t, pair).
    rope = ropes.load(_k_layout(tokens, 4, gl.num_warps())).to(gl.float16)
    rope = rope.reshape([tokens, 4, 4, 2, 2]).permute([1, 3, 2, 4, 0]).reshape([4, 16, tokens])
    latent = latents.load(_k_layout(tokens, 32, gl.num_warps())).to(gl.float16)
    latent = latent.reshape([tokens, 4, 4, 2, 4, 2, 2]).permute([1, 3, 4, 5, 2, 6, 0])
    latent = latent.reshape([4, 128, tokens])
    sums = gl.zeros([4, latent_query.shape[1], tokens], gl.float32, MMA)
    sums = mma_v2(rope_query, gl.convert_layout(rope, operand, assert_trivial=True), sums)
    return mma_v2(latent_query, gl.convert_layout(latent, operand, assert_trivial=True), sums)


@gluon.constexpr_function
def _k_layout(tokens, columns, warps):
    """Give each thread so many neighbouring columns, four threads and then four warps side by side."""
    registers = [[0, 1 << bit] for bit in range(columns.bit_length() - 1)]
    lanes = [[0, columns], [0, 2 * columns], [1, 0], [2, 0], [4, 0]]
    rows = [[1 << bit, 0] for bit in range(3, tokens.bit_length() - 1)]
    split = (warps // 4).bit_length() - 1
    across = [*rows[:split], [0, 4 * columns], [0, 8 * columns]]
    return gl.DistributedLinearLayout(
        registers + rows[split:], lanes, across, [], [tokens, 16 * columns]
    )


@gluon.jit
def softmax_step(parts, peak, total, row_factor, position, limit):
    """Add the partial sums of a tile up; return its weights, what older sums decay by, and the new statistics."""
    scores = gl.sum(parts, 0) * row_factor[:, None]
    token = position + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    scores = gl.where((token < limit)[None, :], scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1))
    decay = gl.exp2(peak - new_peak)
    weight = gl.exp2(scores - (new_peak - P_EXPONENT)[:, None])
    # Added up across threads once, at the end.
    return weight.to(gl.float16), decay, new_peak, total * decay[:, None] + weight


@gluon.jit
def decode_pairs(pairs, CODE: gl.constexpr):
    """Split uint16 pairs of codes into two FP16 tensors, the low bytes' and the high bytes'."""
    e5m2: gl.constexpr = gl.float8e5 == CODE
    convert: gl.constexpr = "cvt.rn.f16x2.e5m2x2" if e5m2 else "cvt.rn.f16x2.e4m3x2"
    # Shifts and masks would become three times the instructions.
    return gl.inline_asm_elementwise(
        "{ .reg .b32 sorted; .reg .b16 low, high; "
        "prmt.b32 sorted, $2, 0, 0x3120; mov.b32 {low, high}, sorted; "
        + convert
        + " $0, low; "
        + convert
        + " $1, high; }",
        "=r,=r,r",
        [pairs],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def copy_tile(
    latents,
    ropes,
    cache,
    latent_page,
    rope_page,
    tile,
    end,
    page_shift,
    stride_page,
    stride_token,
    LATENT: gl.constexpr,
    ROPE: gl.constexpr,
):
    """Start to copy the rows of a tile's tokens; past ``end`` zeros are written.

    Args:
        latents: [tokens, 512] in shared memory.
        ropes: [tokens, 64] in shared memory.
        cache: pointer to the codes.
        latent_page: int32 [tokens], each token's page, in ``SliceLayout(1, LATENT)``.
        rope_page: the same in ``SliceLayout(1, ROPE)``.
        tile: number of the tile in its sequence.
        end: first token that is not copied.
        page_shift: base-2 logarithm of the page size.
        stride_page: bytes from page to page.
        stride_token: bytes from token to token.
        LATENT: layout of the latent copy.
        ROPE: layout of the rope copy.
    """
    _copy_rows(
        latents, cache, latent_page, tile, end, page_shift, stride_page, stride_token, LATENT
    )
    _copy_rows(
        ropes, cache + 512, rope_page, tile, end, page_shift, stride_page, stride_token, ROPE
    )


@gluon.jit
def _copy_rows(
    target, source, page, tile, end, page_shift, stride_page, stride_token, LAYOUT: gl.constexpr
):
    token = tile * target.shape[0] + gl.arange(0, target.shape[0], gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, target.shape[1], gl.SliceLayout(0, LAYOUT))
    offset = (token & ((1 << page_shift) - 1)) * stride_token
    row = page.to(gl.int64) * stride_page + offset
    place = source + (row[:, None] + column[None, :])
    async_copy.async_copy_global_to_shared(target, place, mask=(token < end)[:, None])


@gluon.jit
def load_pages(table, tile, end, page_shift, TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the page of each token of a tile."""
    token = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
    return gl.load(table + (token >> page_shift), mask=token < end, other=0)


@gluon.jit
def copy_pages(target, table, tile, end, page_shift):
    """Start to copy the page of each token of a tile to shared memory, int32 [tokens]."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    token = tile * target.shape[0] + gl.arange(0, target.shape[0], layout)
    async_copy.async_copy_global_to_shared(target, table + (token >> page_shift), token < end)


@gluon.jit
def write_result(result, out, heads, stride_head):
    """Write the rows of heads that there are, in the dtype of ``out``."""
    layout: gl.constexpr = result.type.layout
    head = gl.arange(0, result.shape[0], gl.SliceLayout(1, layout))
    column = gl.arange(0, result.shape[1], gl.SliceLayout(0, layout))
    place = out + head.to(gl.int64)[:, None] * stride_head + column[None, :]
    gl.store(place, result.to(out.dtype.element_ty), mask=(head < heads)[:, None])


@gluon.jit
def write_log_sum(log_sum, lse, heads, stride_head):
    """Write a number per head that there is."""
    head = gl.arange(0, log_sum.shape[0], log_sum.type.layout)
    gl.store(lse + head.to(gl.int64) * stride_head, log_sum, mask=head < heads)


@gluon.jit
def write_nothing(out, lse, heads, splits, stride_out_head, stride_lse_head, HEADS: gl.constexpr):
    """Leave the result of no token; stage 2 ignores the output of an empty split, so only an only split writes it."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [gl.num_warps(), 1], [1, 0])
    if splits == 1:
        nothing = gl.zeros([HEADS, 512], gl.float32, layout)
        write_result(nothing, out, heads, stride_out_head)
    if lse is not None:
        nothing = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
        write_log_sum(nothing, lse, heads, stride_lse_head)
