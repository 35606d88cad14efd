"""The plain Triton kernel of :mod:`fp8kv.kernels.decode_gqa`, for every GPU without a kernel of its own.

A program computes 16 query heads of a KV head, padded where the group has fewer, over one split of a sequence. V is read
as 16-bit pairs of codes (columns 2c and 2c + 1), and its even and odd columns are two products of half the width: only
16-bit elements can be transposed on their way out of shared memory, and bytes would be picked one by one. An unquantised
cache is multiplied as it is, and all columns of V are one product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fp8kv.kernels.cast import BIT_UNITS, decode, decodes_natively
from fp8kv.kernels.decode_gqa_arguments import DecodeGqaArguments, StageOneOutput
from fp8kv.kernels.fp8 import format_of
from fp8kv.kernels.layout import kernel_view
from fp8kv.kernels.pdl import launch_options
from fp8kv.kernels.splits import choose_splits

HEAD_TILE = 16

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))
# P is 2^14 times the probability relative to the running maximum, so that tokens far below an attention sink are no
# subnormal numbers in FP16.
_P_EXPONENT = tl.constexpr(14.0)


@dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
        splits: parts of a sequence.
        tile: tokens that a program handles at a time.
    """

    splits: int
    tile: int


def make_plan(arguments: DecodeGqaArguments, num_splits: int | None) -> Plan:
    """Return how the work is cut; ``num_splits`` is taken where it is given."""
    row_bytes = max(arguments.k_dim, arguments.v_dim) * arguments.k_cache.element_size()
    tile = 128 if row_bytes <= 128 else 64 if row_bytes <= 256 else 32
    row_tiles = triton.cdiv(arguments.group, HEAD_TILE)
    splits = num_splits or choose_splits(
        arguments.batch * arguments.kv_heads * row_tiles,
        arguments.longest_span,
        tile,
        arguments.multiprocessors,
        ctas_per_sm=4 if row_bytes <= 128 else 2,
        min_tokens=tile,
    )
    return Plan(splits, tile)


def launch(arguments: DecodeGqaArguments, plan: Plan, output: StageOneOutput) -> None:
    """Attend every query to every split of its sequence.

    Args:
        arguments: checked.
        plan: of :func:`make_plan`.
        output: what to fill.
    """
    a = arguments
    codes = a.k_cache.element_size() == 1
    native = codes and decodes_natively(a.k_cache.dtype, a.query.device)
    code_format = format_of(a.k_cache.dtype).name if codes else "none"
    row_tiles = triton.cdiv(a.group, HEAD_TILE)
    log_sum = output.log_sum
    decode_gqa_portable_kernel[(a.kv_heads * row_tiles, plan.splits, a.batch)](
        a.query,
        kernel_view(a.k_cache),
        a.v_cache.view(torch.uint8).view(torch.uint16) if codes else a.v_cache,
        a.page_table,
        a.seq_lens,
        a.k_scale,
        a.v_scale,
        a.sinks if output.final else None,
        output.result,
        log_sum,
        a.sm_scale,
        a.soft_cap if a.soft_cap is not None else 0.0,
        a.window if a.window is not None else 0,
        BIT_UNITS[a.k_cache.dtype] if codes and not native else 1.0,
        int(a.k_scale.numel() > 1),
        int(a.v_scale.numel() > 1),
        *a.query.stride()[:2],
        # In units of 16 elements: so the compiler knows that rows are aligned.
        *(stride // 16 for stride in a.k_cache.stride()[:3]),
        *(stride // 16 for stride in a.v_cache.stride()[:3]),
        a.page_table.stride(0),
        *output.result.stride()[:3],
        *(log_sum.stride() if log_sum is not None else (0, 0, 0)),
        GROUP=a.group,
        ROW_TILES=row_tiles,
        HEADS=HEAD_TILE,
        K_DIM=a.k_dim,
        V_DIM=a.v_dim,
        K_COLUMNS=triton.next_power_of_2(a.k_dim),
        V_COLUMNS=triton.next_power_of_2(a.v_dim) // (2 if codes else 1),
        TILE=plan.tile,
        PAGE_SIZE=a.page_size,
        STAGES=3,
        WINDOWED=a.window is not None,
        CAPPED=a.soft_cap is not None,
        FORMAT=code_format,
        NATIVE=native,
        FINAL=output.final,
        PDL=a.pdl,
        num_warps=4,
        **launch_options(a.pdl),
    )


@triton.jit
def _lift(rows):
    """Return the rows as FP16, each times a power of two that brings its largest element near 2^15, and its inverse.

    BF16 turns into FP16 so without losing a bit.
    """
    rows = rows.to(tl.float32)
    peak_bits = tl.max(tl.abs(rows), 1).to(tl.int32, bitcast=True)
    exponent = tl.maximum(peak_bits >> 23, 15)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return (rows * up[:, None]).to(tl.float16), down


@triton.jit
def _decode_pairs(pairs, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """Split 16-bit pairs of codes into two FP16 tensors, the low bytes' and the high bytes'."""
    low = decode((pairs & 0xFF).to(tl.uint8), FORMAT, NATIVE)
    high = decode((pairs >> 8).to(tl.uint8), FORMAT, NATIVE)
    return low, high


@triton.jit(
    do_not_specialize=[
        "window", "k_scale_step", "v_scale_step", "stride_table", "stride_result_split",
        "stride_lse_batch", "stride_lse_head", "stride_lse_split",
    ]
)  # fmt: skip
def decode_gqa_portable_kernel(
    query, k_pages, v_pages, page_table, seq_lens, k_scale, v_scale, sinks, result, log_sum,
    sm_scale, soft_cap, window, unit, k_scale_step, v_scale_step,
    stride_query_batch, stride_query_head, stride_k_page, stride_k_token, stride_k_head,
    stride_v_page, stride_v_token, stride_v_head, stride_table,
    stride_result_batch, stride_result_head, stride_result_split,
    stride_lse_batch, stride_lse_head, stride_lse_split,
    GROUP: tl.constexpr, ROW_TILES: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr,
    V_DIM: tl.constexpr, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr,
    PAGE_SIZE: tl.constexpr, STAGES: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    FORMAT: tl.constexpr, NATIVE: tl.constexpr, FINAL: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Attend HEADS query heads to one split; the arguments are those of ``decode_gqa``, absent tensors None."""
    kv_head = tl.program_id(0) // ROW_TILES
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    group_row = tl.program_id(0) % ROW_TILES * HEADS + tl.arange(0, HEADS)
    is_head = group_row < GROUP
    head = kv_head * GROUP + group_row
    lse_place = batch * stride_lse_batch + head * stride_lse_head + split * stride_lse_split
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    length = tl.load(seq_lens + batch)
    first = 0
    if WINDOWED:
        first = tl.maximum(length - window, 0)
    first_tile = first // TILE
    tiles = tl.cdiv(length, TILE) - first_tile
    begin = (first_tile + tiles * split // splits) * TILE
    last = tl.minimum((first_tile + tiles * (split + 1) // splits) * TILE, length)
    if not FINAL and begin >= last:
        nothing = tl.full([HEADS], float("-inf"), tl.float32)
        tl.store(log_sum + lse_place, nothing, mask=is_head)
        return

    # elements of V that are loaded as one: a pair of codes
    CODES: tl.constexpr = FORMAT != "none"
    V_STEP: tl.constexpr = 2 if CODES else 1
    k_column = tl.arange(0, K_COLUMNS)
    v_column = tl.arange(0, V_COLUMNS)
    k_exists = (k_column < K_DIM)[None, :]
    v_exists = (V_STEP * v_column < V_DIM)[None, :]
    row = query + batch * stride_query_batch + head[:, None] * stride_query_head
    rows = tl.load(row + k_column[None, :], mask=is_head[:, None] & k_exists, other=0.0)
    if CODES:
        rows, down = _lift(rows)
        score_scale = sm_scale * tl.load(k_scale + kv_head * k_scale_step) * unit * _LOG2_E
    else:
        score_scale = sm_scale * _LOG2_E
    if CAPPED:
        # exp2 of the scaled score is then exp(2 * score / soft_cap), of which the tanh is made.
        score_scale = score_scale * 2.0 / soft_cap
    factor = (down * score_scale)[:, None] if CODES else score_scale

    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    # all columns of V where they come one by one
    even = tl.zeros([HEADS, V_COLUMNS], tl.float32)
    odd = tl.zeros([HEADS, V_COLUMNS], tl.float32)
    table = page_table + batch * stride_table
    k_base = k_pages + kv_head.to(tl.int64) * stride_k_head * 16
    v_base = v_pages + kv_head.to(tl.int64) * stride_v_head * (16 // V_STEP)
    for start in tl.range(begin, last, TILE, num_stages=STAGES):
        token = start + tl.arange(0, TILE)
        # Past the end the last token is read again: stale bytes may be NaN, and 0 * NaN is NaN.
        place = tl.minimum(token, last - 1)
        page = tl.load(table + place // PAGE_SIZE).to(tl.int64)
        offset = place % PAGE_SIZE
        k_row = (page * stride_k_page + offset * stride_k_token)[:, None] * 16
        v_row = (page * stride_v_page + offset * stride_v_token)[:, None] * (16 // V_STEP)
        if K_COLUMNS == K_DIM:
            keys = tl.load(k_base + k_row + k_column[None, :])
        else:
            keys = tl.load(k_base + k_row + k_column[None, :], mask=k_exists, other=0)
        if V_STEP * V_COLUMNS == V_DIM:
            values = tl.load(v_base + v_row + v_column[None, :])
        else:
            values = tl.load(v_base + v_row + v_column[None, :], mask=v_exists, other=0)
        if CODES:
            keys = decode(keys, FORMAT, NATIVE)
        scores = tl.dot(rows, tl.trans(keys)) * factor
        if CAPPED:
            scores = soft_cap * _LOG2_E * (1.0 - 2.0 / (1.0 + tl.exp2(scores)))
        visible = token < last
        if WINDOWED:
            visible = visible & (token >= first)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        decay = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - (new_peak - _P_EXPONENT)[:, None])
        total = total * decay + tl.sum(weights, 1)
        peak = new_peak
        if CODES:
            even_values, odd_values = _decode_pairs(values, FORMAT, NATIVE)
            weights = weights.to(tl.float16)
            even = tl.dot(weights, even_values, even * decay[:, None])
            odd = tl.dot(weights, odd_values, odd * decay[:, None])
        else:
            even = tl.dot(weights.to(values.dtype), values, even * decay[:, None])

    base = peak - _P_EXPONENT
    if sinks is not None:
        sink = tl.load(sinks + head, mask=is_head, other=float("-inf")) * _LOG2_E
        # Where there is neither a token nor a sink any finite number serves: -inf - -inf is NaN.
        higher = tl.maximum(tl.maximum(base, sink), -1e30)
        share = tl.exp2(base - higher)
        total = total * share + tl.exp2(sink - higher)
        even *= share[:, None]
        odd *= share[:, None]
        base = higher
    is_empty = total == 0.0
    if CODES:
        weight = tl.load(v_scale + kv_head * v_scale_step) * unit / tl.where(is_empty, 1.0, total)
        output = tl.join(even * weight[:, None], odd * weight[:, None])
        output = tl.reshape(output, [HEADS, 2 * V_COLUMNS])
    else:
        output = even / tl.where(is_empty, 1.0, total)[:, None]
    column = tl.arange(0, V_STEP * V_COLUMNS)
    out_row = batch * stride_result_batch + head * stride_result_head + split * stride_result_split
    out_exists = is_head[:, None] & (column < V_DIM)[None, :]
    out_place = result + out_row[:, None] + column[None, :]
    tl.store(out_place, output.to(result.dtype.element_ty), mask=out_exists)
    if log_sum is not None:
        logarithm = base + tl.log2(tl.where(is_empty, 1.0, total))
        if FINAL:
            logarithm = tl.where(is_empty, float("-inf"), logarithm * _LN_2)
        tl.store(log_sum + lse_place, logarithm, mask=is_head)
