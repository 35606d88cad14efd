"""The kernel of :mod:`fp8kv.kernels.hopper.decode_mla_small`.

A tile of the cache arrives in shared memory as FP8, by asynchronous copies of 16 bytes that run several tiles ahead (any
page size will do, as every row is addressed by itself). It is widened to FP16 on its way to the matrix units, twice:

    scores   S = Q K^T. Each of four warps takes a quarter of the *columns* for all tokens, so that a quarter of Q stays
             in its registers; with the tokens dealt out instead, every warp would read all of Q for every tile. The
             four partial sums meet in shared memory. Products may be added up in any order: K's columns are permuted,
             and Q's alike, so that the 16 bytes of one load are operands as they lie.
    values   O += P V. Each warp takes some of the columns for all tokens. V is read as 16-bit pairs of codes, which
             ``ldmatrix`` transposes; the even and the odd columns are two sums.

Between the two, each warp computes the softmax of some of the heads. One after the other, the three would leave the
matrix units waiting for barriers and for each other's results; so a pass through the loop has the values of tile i, the
softmax of tile i + 1 and the scores of tile i + 2, which do not depend on each other, and two barriers with nothing
between them but the exchange.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents

from fp8kv.kernels.hopper.decode_mla_small_tile import (
    P_EXPONENT,
    copy_pages,
    copy_tile,
    decode_pairs,
    load_pages,
    load_query,
    partial_scores,
    softmax_step,
    write_log_sum,
    write_nothing,
    write_result,
)


@gluon.jit(
    do_not_specialize=[
        "heads",
        "head_blocks",
        "splits",
        "page_shift",
        "stride_table",
        "stride_lse_batch",
        "stride_lse_head",
        "stride_lse_split",
    ]
)
def decode_kernel(
    query,
    cache,
    page_table,
    seq_lens,
    scale,
    out,
    lse,
    score_scale,
    lse_unit,
    heads,
    head_blocks,
    splits,
    page_shift,
    stride_query_batch,
    stride_query_head,
    stride_page,
    stride_token,
    stride_table,
    stride_out_batch,
    stride_out_head,
    stride_out_split,
    stride_lse_batch,
    stride_lse_head,
    stride_lse_split,
    HEADS: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """Attend up to HEADS heads to one split; the launcher describes the tensors, strides are in elements."""
    program = gl.program_id(0)
    first_head = (program % head_blocks).to(gl.int64) * HEADS
    split = program // head_blocks % splits
    batch = (program // head_blocks // splits).to(gl.int64)
    length = gl.load(seq_lens + batch)
    span = gl.cdiv(gl.cdiv(length, splits), TILE) * TILE
    start = split * span
    end = gl.minimum(length, start + span)
    heads -= first_head.to(gl.int32)
    query += batch * stride_query_batch + first_head * stride_query_head
    out += batch * stride_out_batch + first_head * stride_out_head + split * stride_out_split
    if lse is not None:
        lse += batch * stride_lse_batch + first_head * stride_lse_head + split * stride_lse_split
    if start >= end:
        write_nothing(out, lse, heads, splits, stride_out_head, stride_lse_head, HEADS)
        return
    tiles = gl.cdiv(end - start, TILE)
    first = start // TILE
    table = page_table + batch * stride_table
    address = (end, page_shift, stride_page, stride_token)
    warps: gl.constexpr = gl.num_warps()
    scores_mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1, warps // 4], [1, 16, 8])
    values_mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8])
    p_operand: gl.constexpr = gl.DotOperandLayout(0, values_mma, 2)
    v_operand: gl.constexpr = gl.DotOperandLayout(1, values_mma, 2)
    # The four partial sums of a score in one thread, a row of scores in one warp.
    rows: gl.constexpr = HEADS // warps
    softmax: gl.constexpr = gl.BlockedLayout(
        [4, 1, TILE * rows // 32], [1, rows, 32 // rows], [1, warps, 1], [2, 1, 0]
    )
    softmax_row: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, softmax))
    latent_copy: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [warps, 1], [1, 0])
    rope_copy: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [warps, 1], [1, 0])

    # Swizzled so that neither the copies, nor 16-byte loads of K, nor ldmatrix of V meet in a bank.
    latent_shared: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 8, [1, 0])
    pairs_shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    rope_shared: gl.constexpr = gl.SwizzledSharedLayout(16, 2, 4, [1, 0])
    parts_shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [2, 1, 0])
    weights_shared: gl.constexpr = gl.SwizzledSharedLayout(8, 64 // TILE, TILE // 8, [1, 0])
    vector_shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    code: gl.constexpr = cache.dtype.element_ty
    latents = gl.allocate_shared_memory(code, [STAGES, TILE, 512], latent_shared)
    ropes = gl.allocate_shared_memory(code, [STAGES, TILE, 64], rope_shared)
    pages = gl.allocate_shared_memory(gl.int32, [STAGES, TILE], vector_shared)
    parts = gl.allocate_shared_memory(gl.float32, [4, HEADS, TILE], parts_shared)
    weights = gl.allocate_shared_memory(gl.float16, [HEADS, TILE], weights_shared)
    decays = gl.allocate_shared_memory(gl.float32, [HEADS], vector_shared)

    # The first tiles find their pages in memory; the pages of tile i + STAGES are copied along with tile i.
    for stage in gl.static_range(STAGES):
        copy_pages(pages.index(stage), table, first + STAGES + stage, end, page_shift)
    for stage in gl.static_range(STAGES):
        copy_tile(
            latents.index(stage),
            ropes.index(stage),
            cache,
            load_pages(table, first + stage, end, page_shift, TILE, latent_copy),
            load_pages(table, first + stage, end, page_shift, TILE, rope_copy),
            first + stage,
            *address,
            latent_copy,
            rope_copy,
        )
        async_copy.commit_group()

    latent_query, rope_query, shrink = load_query(
        query, heads, stride_query_head, scores_mma, HEADS
    )
    kv_scale = gl.load(scale)
    row_factor = gl.convert_layout(shrink, softmax_row) * (score_scale * kv_scale)
    peak = gl.full([HEADS], float("-inf"), gl.float32, softmax_row)
    total = gl.zeros([HEADS, TILE], gl.float32, gl.SliceLayout(0, softmax))
    even = gl.zeros([HEADS, 256], gl.float32, values_mma)
    odd = gl.zeros([HEADS, 256], gl.float32, values_mma)
    limit = end - start

    async_copy.wait_group(STAGES - 1)
    parts.store(
        partial_scores(latent_query, rope_query, latents.index(0), ropes.index(0), scores_mma)
    )
    async_copy.wait_group(STAGES - 2)
    weight, decay, peak, total = softmax_step(
        parts.load(softmax), peak, total, row_factor, 0, limit
    )
    part = partial_scores(latent_query, rope_query, latents.index(1), ropes.index(1), scores_mma)
    weights.store(weight)
    decays.store(decay)
    parts.store(part)
    async_copy.wait_group(STAGES - 3)

    stage = 0
    scores_stage = 2
    for tile in range(tiles):
        # Three tiles at once, independent of each other: softmax of the next, values of this one, scores of the
        # second next. Past the end a tile is zeros, and its weights are 0.
        weight, decay, peak, total = softmax_step(
            parts.load(softmax), peak, total, row_factor, (tile + 1) * TILE, limit
        )
        pair = (
            latents.index(stage)._reinterpret(gl.uint16, [TILE, 256], pairs_shared).load(v_operand)
        )
        p = weights.load(p_operand)
        scale_down = decays.load(gl.SliceLayout(1, values_mma))[:, None]
        latent_page = pages.index(stage).load(gl.SliceLayout(1, latent_copy))
        rope_page = pages.index(stage).load(gl.SliceLayout(1, rope_copy))
        even_tile, odd_tile = decode_pairs(pair, code)
        even = mma_v2(p, even_tile, even * scale_down)
        odd = mma_v2(p, odd_tile, odd * scale_down)
        part = partial_scores(
            latent_query,
            rope_query,
            latents.index(scores_stage),
            ropes.index(scores_stage),
            scores_mma,
        )
        # From here on what the other warps read above is overwritten; the compiler puts a barrier in between.
        ahead = first + tile + STAGES
        copy_tile(
            latents.index(stage),
            ropes.index(stage),
            cache,
            latent_page,
            rope_page,
            ahead,
            *address,
            latent_copy,
            rope_copy,
        )
        copy_pages(pages.index(stage), table, ahead + STAGES, end, page_shift)
        async_copy.commit_group()
        weights.store(weight)
        decays.store(decay)
        parts.store(part)
        async_copy.wait_group(STAGES - 3)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        scores_stage = gl.where(scores_stage == STAGES - 1, 0, scores_stage + 1)
    async_copy.wait_group(0)
    if PDL:
        gdc_launch_dependents()

    total = gl.sum(total, 1)
    decays.store(kv_scale / total)
    factor = decays.load(gl.SliceLayout(1, values_mma))[:, None]
    result = gl.join(even * factor, odd * factor).reshape([HEADS, 512])
    write_result(result, out, heads, stride_out_head)
    if lse is not None:
        log_sum = (peak - P_EXPONENT + gl.log2(total)) * lse_unit
        write_log_sum(log_sum, lse, heads, stride_lse_head)
