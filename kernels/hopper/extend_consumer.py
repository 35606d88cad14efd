"""What multiplies the tiles of :mod:`fp8kv.kernels.hopper.extend`: a warp group with 64 query rows of its own.

The product of a tile's weights with its values is issued behind the next tile's scores, so that the tensor cores have work
while those are prepared for the exponentials; the products of the other consumers fill what is left. No product is in
flight over a loop's edge: ptxas would then wait for each of them by itself.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fp8kv.kernels.hopper.extend_producer import tile_at

_LOG2_E = gl.constexpr(math.log2(math.e))
_LN_2 = gl.constexpr(math.log(2.0))


@gluon.jit
def power_of_two(exponent):
    """Return ``2 ** exponent`` as float32, for int32 exponents of -126 to 127, without rounding."""
    return ((exponent + 127) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def consume(WHICH: gl.constexpr, rows, segments, queries, tiles, ready, form: gl.constexpr):
    """Compute 64 rows from beginning to end."""
    (query, stride_q_token, stride_q_head, out, stride_o_token, stride_o_head,
     lse, stride_lse_token, stride_lse_head, sinks, first_row, new_tokens, prefix, window, soft_cap,
     sm_scale, k_unit, v_unit, new_k_unit, new_v_unit) = rows  # fmt: skip
    cache_tiles, cache_limit, new_tiles, new_limit = segments
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, form.block_n, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, form.dim, 16])
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)

    DIM: gl.constexpr = form.dim
    TAIL: gl.constexpr = form.tail
    BLOCK_N: gl.constexpr = form.block_n
    q_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q_tile = queries[0].index(WHICH)
    q_tail = queries[1].index(WHICH)
    row = first_row + WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, q_layout))
    token = row // form.group
    place = query + token.to(gl.int64) * stride_q_token + (row % form.group) * stride_q_head
    # BF16 becomes FP16 without loss once the row's largest magnitude lies in [2^14, 2^15).
    main = _load_query(place, token < new_tokens, DIM, q_layout)
    largest = gl.max(gl.abs(main), 1)
    if form.tail:
        tail = _load_query(place + form.dim, token < new_tokens, TAIL, q_layout)
        largest = gl.maximum(largest, gl.max(gl.abs(tail), 1))
    exponent = gl.maximum((largest.to(gl.int32, bitcast=True) >> 23) - 127, -100)
    raised = power_of_two(14 - exponent)
    q_tile.store((main * raised[:, None]).to(gl.float16))
    if form.tail:
        q_tail.store((tail * raised[:, None]).to(gl.float16))
    fence_async_shared()
    row_factor = power_of_two(exponent - 14) * (sm_scale * _LOG2_E)
    row_factor = gl.convert_layout(row_factor, s_row)

    row = first_row + WHICH * 64 + gl.arange(0, 64, s_row)
    token = row // form.group
    # Finite, so that -inf of a masked score minus the maximum is never NaN.
    peak = gl.full([64], -1.0e30, gl.float32, s_row)
    total = gl.zeros([64], gl.float32, s_row)
    acc = gl.zeros([64, DIM], gl.float32, o_layout)
    weights = gl.zeros([64, BLOCK_N], gl.float16, gl.DotOperandLayout(0, o_layout, 2))
    ratio = new_v_unit / v_unit
    count = 0
    for segment in range(0 if form.cached else 1, 1 if form.new == "none" else 2):
        is_new = segment == 1
        first = gl.where(is_new, new_tiles[0], cache_tiles[0])
        full_begin = gl.where(is_new, new_tiles[1], cache_tiles[1])
        full_end = gl.where(is_new, new_tiles[2], cache_tiles[2])
        last = gl.where(is_new, new_tiles[3], cache_tiles[3])
        limit = gl.where(is_new, new_limit, cache_limit)
        position = token + gl.where(is_new, 0, prefix)
        factor = row_factor * gl.where(is_new, new_k_unit, k_unit)
        lift = 0.0
        if form.cached and form.new != "none":
            # V's unit changes from the prefix to the new tokens. The accumulator keeps the first one: the
            # new tokens' weights, and with them the sum of all weights, are taken times the ratio.
            lift = gl.where(is_new, gl.log2(ratio), 0.0)
            total = total * gl.where(is_new, ratio, 1.0)
        order = (first, full_begin, full_end, last)
        for step in range(full_begin - first + last - full_end):
            column = tile_at(step, order) * form.block_n
            acc, weights, total, peak = _attend(
                count, acc, weights, total, peak, q_tile, q_tail, factor, lift, position, column,
                limit, window, soft_cap, tiles, ready, True, form,
            )  # fmt: skip
            count += 1
        for _ in range(full_end - full_begin):
            acc, weights, total, peak = _attend(
                count, acc, weights, total, peak, q_tile, q_tail, factor, lift, position, 0,
                limit, window, soft_cap, tiles, ready, False, form,
            )  # fmt: skip
            count += 1
    stage = (count - 1) % form.stages
    mbarrier.wait(ready[2].index(stage), ((count - 1) // form.stages) & 1)
    fence_async_shared()
    acc = warpgroup_mma(weights, tiles[2].index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])

    unit = v_unit
    if not form.cached:
        unit = new_v_unit
    elif form.new != "none":
        total = total * (1.0 / ratio)
    if form.sinks:
        sink = gl.load(sinks + row % form.group) * _LOG2_E
        new_peak = gl.maximum(peak, sink)
        decay = gl.exp2(peak - new_peak)
        total = total * decay + gl.exp2(sink - new_peak)
        unit = unit * decay
        peak = new_peak
    # A row without keys has a total of 0: its output is 0 and its log-sum-exp -inf.
    unit = gl.convert_layout(unit / gl.where(total > 0.0, total, 1.0), o_row)
    if form.lse:
        log_sum = gl.where(total > 0.0, (peak + gl.log2(total)) * _LN_2, float("-inf"))
        place = token.to(gl.int64) * stride_lse_token + (row % form.group) * stride_lse_head
        gl.store(lse + place, log_sum, mask=token < new_tokens)
    row = first_row + WHICH * 64 + gl.arange(0, 64, o_row)
    token = row // form.group
    place = out + token.to(gl.int64) * stride_o_token + (row % form.group) * stride_o_head
    column = gl.arange(0, form.dim, gl.SliceLayout(0, o_layout))
    scaled = (acc * unit[:, None]).to(out.dtype.element_ty)
    gl.store(place[:, None] + column[None, :], scaled, mask=(token < new_tokens)[:, None])


@gluon.jit
def _attend(
    count, acc, weights, total, peak, q_tile, q_tail, factor, lift, position, column0,
    limit, window, soft_cap, tiles, ready, MASKED: gl.constexpr, form: gl.constexpr,
):  # fmt: skip
    """Multiply the weights of the tile in front by its values, and compute the weights of tile ``count``."""
    k_full, k_empty, v_full, v_empty = ready
    BLOCK_N: gl.constexpr = form.block_n
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, form.block_n, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, form.dim, 16])
    stage = count % form.stages
    # The values of the tile in front. Before the first tile the weights are zeros, and its own values serve.
    before = gl.maximum(count - 1, 0)
    v_stage = before % form.stages
    mbarrier.wait(v_full.index(v_stage), (before // form.stages) & 1)
    mbarrier.wait(k_full.index(stage), (count // form.stages) & 1)
    # Makes the producer's ordinary stores visible to wgmma, which reads through the asynchronous proxy.
    fence_async_shared()
    score = gl.zeros([64, BLOCK_N], gl.float32, layout)
    k_tile = tiles[0].index(stage).permute((1, 0))
    score = warpgroup_mma(q_tile, k_tile, score, use_acc=False, is_async=True)
    if form.tail:
        k_tail = tiles[1].index(stage).permute((1, 0))
        score = warpgroup_mma(q_tail, k_tail, score, is_async=True)
    acc = warpgroup_mma(weights, tiles[2].index(v_stage), acc, is_async=True)
    score = warpgroup_mma_wait(1, deps=[score])
    mbarrier.arrive(k_empty.index(stage), count=1)
    if form.soft_cap:
        grown = gl.exp2(score * (factor * (2.0 / soft_cap))[:, None])
        score = (soft_cap * _LOG2_E) * (1.0 - 2.0 / (grown + 1.0))
    if MASKED:
        column = column0 + gl.arange(0, form.block_n, gl.SliceLayout(0, layout))
        seen = (column < limit)[None, :]
        if form.causal:
            seen = seen & (column[None, :] <= position[:, None])
        if form.window:
            seen = seen & (column[None, :] > position[:, None] - window)
        score = gl.where(seen, score, float("-inf"))
    if form.soft_cap:
        new_peak = gl.maximum(peak, gl.max(score, 1))
        weight = gl.exp2(score - (new_peak - lift)[:, None])
    else:
        new_peak = gl.maximum(peak, gl.max(score, 1) * factor)
        weight = gl.exp2(score * factor[:, None] - (new_peak - lift)[:, None])
    decay = gl.exp2(peak - new_peak)
    total = total * decay + gl.sum(weight, 1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(v_stage), count=1, pred=count > 0)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
    weights = gl.convert_layout(weight.to(gl.float16), gl.DotOperandLayout(0, o_layout, 2))
    return acc, weights, total, new_peak


@gluon.jit
def _load_query(place, inside, WIDTH: gl.constexpr, layout: gl.constexpr):
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    return gl.load(place[:, None] + column[None, :], mask=inside[:, None], other=0.0).to(gl.float32)
