"""The Gluon kernel of :mod:`fp8kv.kernels.hopper.decode_gqa`."""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fp8kv.kernels.hopper.decode_gqa_roles import consume, produce
from fp8kv.kernels.hopper.decode_gqa_tile import P_EXPONENT, attend, fetch, find_pages

_LOG2_E = gl.constexpr(math.log2(math.e))
_LN_2 = gl.constexpr(math.log(2.0))
# Below any score: a warp's part of a tile may lie outside the split as a whole.
_LOWEST = gl.constexpr(-1e30)
_PRODUCER_REGISTERS = gl.constexpr(40)


@gluon.jit(
    do_not_specialize=[
        "window", "k_scale_step", "v_scale_step", "stride_table", "stride_result_split",
        "stride_lse_batch", "stride_lse_head", "stride_lse_split",
    ]
)  # fmt: skip
def decode_gqa_kernel(
    query, k_source, v_source, page_table, seq_lens, k_scale, v_scale, sinks, result, log_sum,
    sm_scale, soft_cap, window, k_scale_step, v_scale_step,
    stride_query_batch, stride_query_head, stride_table,
    stride_result_batch, stride_result_head, stride_result_split,
    stride_lse_batch, stride_lse_head, stride_lse_split,
    GROUP: gl.constexpr, ROW_TILES: gl.constexpr, HEADS: gl.constexpr, K_DIM: gl.constexpr,
    V_DIM: gl.constexpr, K_BLOCK: gl.constexpr, V_BLOCK: gl.constexpr, WARPS: gl.constexpr,
    WARP_TOKENS: gl.constexpr, PAGE_SIZE: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
    SLOTS: gl.constexpr, WINDOWED: gl.constexpr, CAPPED: gl.constexpr, E5M2: gl.constexpr,
    FINAL: gl.constexpr, ROLES: gl.constexpr, PDL: gl.constexpr,
) -> None:  # fmt: skip
    """Attend HEADS query heads to one split; the arguments are those of ``decode_gqa``, absent tensors None."""
    TILE: gl.constexpr = WARPS * WARP_TOKENS
    COLUMNS_K: gl.constexpr = min(K_BLOCK, 128)
    COLUMNS_V: gl.constexpr = min(V_BLOCK, 128)
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8]
    )
    kv_head = gl.program_id(0) // ROW_TILES
    split = gl.program_id(1)
    splits = gl.num_programs(1)
    batch = gl.program_id(2).to(gl.int64)
    first_row = gl.program_id(0) % ROW_TILES * HEADS
    STATS: gl.constexpr = gl.SliceLayout(1, MMA)
    BY_HEAD: gl.constexpr = gl.SliceLayout(0, STATS)
    group_row = first_row + gl.arange(0, HEADS, layout=BY_HEAD)
    head = kv_head * GROUP + group_row
    lse_place = batch * stride_lse_batch + head * stride_lse_head + split * stride_lse_split
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    length = gl.load(seq_lens + batch)
    first = 0
    if WINDOWED:
        first = gl.maximum(length - window, 0)
    first_tile = first // TILE
    tiles = (length + TILE - 1) // TILE - first_tile
    begin = (first_tile + tiles * split // splits) * TILE
    last = gl.minimum((first_tile + tiles * (split + 1) // splits) * TILE, length)
    if not FINAL and begin >= last:
        nothing = gl.full([HEADS], float("-inf"), gl.float32, BY_HEAD)
        gl.store(log_sum + lse_place, nothing, mask=group_row < GROUP)
        return

    # Copies of a tile: one for every page, or one of a part of a page.
    BOXES: gl.constexpr = TILE // ROWS
    K_RING: gl.constexpr = [SLOTS * (K_BLOCK // COLUMNS_K) * BOXES, 1, ROWS, 1, COLUMNS_K]
    V_RING: gl.constexpr = [SLOTS * (V_BLOCK // COLUMNS_V) * BOXES, 1, ROWS, 1, COLUMNS_V]
    k_ring = gl.allocate_shared_memory(k_source.dtype, K_RING, k_source.layout)
    v_ring = gl.allocate_shared_memory(v_source.dtype, V_RING, v_source.layout)
    # The same bytes as tiles, V as pairs of codes.
    k_tiles = k_ring._reinterpret(
        k_source.dtype,
        [SLOTS, WARPS, WARP_TOKENS, K_BLOCK],
        gl.NVMMASharedLayout(COLUMNS_K, 8, 3),
    )
    v_tiles = v_ring._reinterpret(
        gl.uint16,
        [SLOTS, WARPS, WARP_TOKENS, V_BLOCK // 2],
        gl.NVMMASharedLayout(COLUMNS_V, 16, 3),
    )
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(barriers.index(slot), count=1)
    if ROLES:
        released = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(STAGES):
            mbarrier.init(released.index(slot), count=1)
    table = page_table + batch * stride_table
    last_page = (gl.maximum(last, 1) - 1) // PAGE_SIZE
    if not ROLES:
        # All pages before the first copy: loads do not overtake copies, and would wait for each other.
        pages = find_pages(begin, last_page, table, PAGE_SIZE, BOXES)
        for slot in gl.static_range(1, STAGES):
            pages += find_pages(begin + slot * TILE, last_page, table, PAGE_SIZE, BOXES)
        for slot in gl.static_range(STAGES):
            start = begin + slot * TILE
            fetch(
                start, start < last, pages, slot * BOXES, kv_head, k_source, v_source, k_ring,
                v_ring, barriers, slot, PAGE_SIZE, TILE, K_BLOCK, V_BLOCK,
            )  # fmt: skip

    Q: gl.constexpr = gl.DotOperandLayout(1, MMA, 4)
    Q_ROWS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, Q))
    q_row = first_row + gl.arange(0, HEADS, layout=Q_ROWS)
    column = gl.arange(0, K_BLOCK, layout=gl.SliceLayout(1, gl.SliceLayout(0, Q)))
    q_place = batch * stride_query_batch + (kv_head * GROUP + q_row)[None, :] * stride_query_head
    exists = (q_row < GROUP)[None, :] & (column < K_DIM)[:, None]
    rows = gl.load(query + q_place + column[:, None], mask=exists, other=0.0).to(gl.float32)
    # A power of two brings a row's largest element near 2^15: BF16 turns into FP16 without losing a bit.
    peak_bits = gl.max(gl.abs(rows), 0).to(gl.int32, bitcast=True)
    exponent = gl.maximum(peak_bits >> 23, 15)
    up = ((268 - exponent) << 23).to(gl.float32, bitcast=True)
    down = ((exponent - 14) << 23).to(gl.float32, bitcast=True)
    rows = (rows * up[None, :]).to(gl.float16)[None, :, :]
    rows, _ = gl.broadcast(rows, gl.zeros([WARPS, K_BLOCK, HEADS], gl.float16, Q))
    score_scale = sm_scale * gl.load(k_scale + kv_head * k_scale_step) * _LOG2_E
    if CAPPED:
        score_scale = score_scale * 2.0 / soft_cap
        soft_cap = soft_cap * _LOG2_E
    peak = gl.full([WARPS, HEADS], _LOWEST, gl.float32, STATS)
    factor = gl.convert_layout(down * score_scale, BY_HEAD)[None, :]
    factor, _ = gl.broadcast(factor, peak)
    total = gl.zeros([WARPS, HEADS], gl.float32, STATS)
    even = gl.zeros([WARPS, V_BLOCK // 2, HEADS], gl.float32, MMA)
    odd = gl.zeros([WARPS, V_BLOCK // 2, HEADS], gl.float32, MMA)

    if ROLES:
        tokens = (begin, first, last)
        state = (peak, total, even, odd)
        peak, total, even, odd = gl.warp_specialize(
            [
                (
                    consume,
                    (
                        tokens, k_tiles, v_tiles, barriers, released, rows, factor, soft_cap, state,
                        MMA, WINDOWED, CAPPED, E5M2, STAGES,
                    ),
                ),
                (
                    produce,
                    (
                        tokens, table, kv_head, k_source, v_source, k_ring, v_ring, barriers,
                        released, PAGE_SIZE, TILE, K_BLOCK, V_BLOCK, STAGES,
                    ),
                ),
            ],
            [1],
            [_PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        full = begin + gl.maximum(last - begin, 0) // TILE * TILE
        slot = 0
        phase = 0
        for start in range(begin, full, TILE):
            after = start + STAGES * TILE
            next_pages = find_pages(after, last_page, table, PAGE_SIZE, BOXES)
            mbarrier.wait(barriers.index(slot), phase)
            peak, total, even, odd = attend(
                start, first, last, k_tiles.index(slot), v_tiles.index(slot), rows, factor,
                soft_cap, peak, total, even, odd, MMA, WINDOWED, CAPPED, E5M2,
            )  # fmt: skip
            fetch(
                after, after < last, next_pages, 0, kv_head, k_source, v_source, k_ring, v_ring,
                barriers, slot, PAGE_SIZE, TILE, K_BLOCK, V_BLOCK,
            )  # fmt: skip
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        if full < last:
            mbarrier.wait(barriers.index(slot), phase)
            peak, total, even, odd = attend(
                full, first, last, k_tiles.index(slot), v_tiles.index(slot), rows, factor,
                soft_cap, peak, total, even, odd, MMA, True, CAPPED, E5M2,
            )  # fmt: skip

    # Every thread gets its columns of all warps, and adds them up by itself: 16 bytes of a row to a thread.
    OUT: gl.constexpr = gl.BlockedLayout(
        [WARPS, 1, 4],
        [1, max(128 // V_BLOCK, 1), min(V_BLOCK // 4, 32)],
        [1, WARPS, 1],
        [2, 1, 0],
    )
    BY_WARP: gl.constexpr = gl.SliceLayout(2, OUT)
    output = gl.join(even, odd).permute((0, 2, 1, 3)).reshape([WARPS, HEADS, V_BLOCK])
    output = gl.convert_layout(output, OUT)
    peak = gl.convert_layout(peak, BY_WARP)
    total = gl.convert_layout(total, BY_WARP)
    top = gl.max(peak, 0)
    share = gl.exp2(peak - top[None, :])
    total = gl.sum(total * share, 0)
    output = gl.sum(output * share[:, :, None], 0)
    top = top - P_EXPONENT
    group_row = first_row + gl.arange(0, HEADS, layout=gl.SliceLayout(0, BY_WARP))
    head = kv_head * GROUP + group_row
    if sinks is not None:
        sink = gl.load(sinks + head, mask=group_row < GROUP, other=float("-inf")) * _LOG2_E
        higher = gl.maximum(top, sink)
        share = gl.exp2(top - higher)
        total = total * share + gl.exp2(sink - higher)
        top = higher
        weight = share * gl.load(v_scale + kv_head * v_scale_step)
    else:
        weight = gl.load(v_scale + kv_head * v_scale_step)
    is_empty = total == 0.0
    weight = weight / gl.where(is_empty, 1.0, total)
    weight = gl.convert_layout(weight, gl.SliceLayout(1, gl.SliceLayout(0, OUT)))
    output = output * weight[:, None]
    out_row = first_row + gl.arange(0, HEADS, layout=gl.SliceLayout(1, gl.SliceLayout(0, OUT)))
    column = gl.arange(0, V_BLOCK, layout=gl.SliceLayout(0, gl.SliceLayout(0, OUT)))
    place = batch * stride_result_batch + split * stride_result_split
    place += (kv_head * GROUP + out_row) * stride_result_head
    exists = (out_row < GROUP)[:, None] & (column < V_DIM)[None, :]
    place = place[:, None] + column[None, :]
    gl.store(result + place, output.to(result.dtype.element_ty), mask=exists)
    if log_sum is not None:
        logarithm = top + gl.log2(total)
        if FINAL:
            logarithm = gl.where(is_empty, float("-inf"), logarithm * _LN_2)
        place = batch * stride_lse_batch + head * stride_lse_head + split * stride_lse_split
        gl.store(log_sum + place, logarithm, mask=group_row < GROUP)
