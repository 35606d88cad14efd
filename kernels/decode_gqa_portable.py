"""The plain Triton kernel of :mod:`fp8kv.kernels.decode_gqa`, for every GPU without a kernel of its own.

A program computes 16 query heads of a KV head, padded where the group has fewer, over one split of a sequence. V is read
as 16-bit pairs of codes (columns 2c and 2c + 1), and its even and odd columns are two products of half the width: only
16-bit elements can be transposed on their way out of shared memory, and bytes would be picked one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fp8kv.kernels.cast import decodes_natively
from fp8kv.kernels.decode_gqa_arguments import DecodeGqaArguments, StageOneOutput
from fp8kv.kernels.fp8 import format_of
from fp8kv.kernels.pdl import launch_options
from fp8kv.kernels.splits import choose_splits

HEAD_TILE = 16

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))
# P is 2^14 times the probability relative to the running maximum, so that tokens far below an attention sink are no
# subnormal numbers in FP16.
_P_EXPONENT = tl.constexpr(14.0)
# FP16's exponent bias less the format's: what a number made of a code's bits must be multiplied by, as a power of two.
_BIAS_GAPS = {"e4m3fn": 8, "e5m2": 0, "e4m3fnuz": 7}


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
    tile = 128 if max(arguments.k_dim, arguments.v_dim) <= 128 else 64
    row_tiles = triton.cdiv(arguments.group, HEAD_TILE)
    splits = num_splits or choose_splits(
        arguments.batch * arguments.kv_heads * row_tiles,
        arguments.longest_span,
        tile,
        arguments.multiprocessors,
        ctas_per_sm=4 if tile == 128 else 2,
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
    native = decodes_natively(a.k_cache.dtype, a.query.device)
    code_format = format_of(a.k_cache.dtype).name
    row_tiles = triton.cdiv(a.group, HEAD_TILE)
    log_sum = output.log_sum
    decode_gqa_portable_kernel[(a.kv_heads * row_tiles, plan.splits, a.batch)](
        a.query,
        a.k_cache.view(torch.uint8),
        a.v_cache.view(torch.uint8).view(torch.uint16),
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
        1.0 if native else 2.0 ** _BIAS_GAPS[code_format],
        int(a.k_scale.numel() > 1),
        int(a.v_scale.numel() > 1),
        *a.query.stride()[:2],
        # In units of 16 bytes: so the compiler knows that rows are aligned.
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
        V_PAIRS=triton.next_power_of_2(a.v_dim) // 2,
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
def _decode_bits(codes, FORMAT: tl.constexpr):
    """Return FP16 numbers made of the bits of codes in uint16: exact, NaN kept, a power of two too small."""
    if FORMAT == "e5m2":
        half = codes << 8
    else:
        half = ((codes & 0x80) << 8) | ((codes & 0x7F) << 7)
        is_nan = (codes & 0x7F) == 0x7F if FORMAT == "e4m3fn" else codes == 0x80
        half = tl.where(is_nan, 0x7E00, half)
    return half.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _decode_codes(codes, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """Return the FP16 numbers of codes in uint8."""
    if NATIVE and FORMAT == "e5m2":
        return codes.to(tl.float8e5, bitcast=True).to(tl.float16)
    elif NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        return _decode_bits(codes.to(tl.uint16), FORMAT)


@triton.jit
def _decode_pairs(pairs, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """Split 16-bit pairs of codes into two FP16 tensors, the low bytes' and the high bytes'."""
    low = _decode_codes((pairs & 0xFF).to(tl.uint8), FORMAT, NATIVE)
    high = _decode_codes((pairs >> 8).to(tl.uint8), FORMAT, NATIVE)
    return low, high


@triton.jit(
    do_not_specialize=[
        "window", "k_scale_step", "v_scale_step", "stride_table", "stride_result_split",
        "stride_lse_batch", "stride_lse_head", "stride_lse_split",
    ]
)  # fmt: skip
def decode_gqa_portable_kernel(
    query, k_codes, v_pairs, page_table, seq_lens, k_scale, v_scale, sinks, result, log_sum,
    sm_scale, soft_cap, window, unit, k_scale_step, v_scale_step,
    stride_query_batch, stride_query_head, stride_k_page, stride_k_token, stride_k_head,
    stride_v_page, stride_v_token, stride_v_head, stride_table,
    stride_result_batch, stride_result_head, stride_result_split,
    stride_lse_batch, stride_lse_head, stride_lse_split,
    GROUP: tl.constexpr, ROW_TILES: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr,
    V_DIM: tl.constexpr, K_COLUMNS: tl.constexpr, V_PAIRS: tl.constexpr, TILE: tl.constexpr,
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

    k_column = tl.arange(0, K_COLUMNS)
    v_pair = tl.arange(0, V_PAIRS)
    k_exists = (k_column < K_DIM)[None, :]
    v_exists = (2 * v_pair < V_DIM)[None, :]
    row = query + batch * stride_query_batch + head[:, None] * stride_query_head
    rows = tl.load(row + k_column[None, :], mask=is_head[:, None] & k_exists, other=0.0)
    rows = rows.to(tl.float32)
    # A power of two brings a row's largest element near 2^15: BF16 turns into FP16 without losing a bit.
    peak_bits = tl.max(tl.abs(rows), 1).to(tl.int32, bitcast=True)
    exponent = tl.maximum(peak_bits >> 23, 15)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    rows = (rows * up[:, None]).to(tl.float16)
    score_scale = sm_scale * tl.load(k_scale + kv_head * k_scale_step) * unit * _LOG2_E
    if CAPPED:
        # exp2 of the scaled score is then exp(2 * score / soft_cap), of which the tanh is made.
        score_scale = score_scale * 2.0 / soft_cap
    factor = (down * score_scale)[:, None]

    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    even = tl.zeros([HEADS, V_PAIRS], tl.float32)
    odd = tl.zeros([HEADS, V_PAIRS], tl.float32)
    table = page_table + batch * stride_table
    k_base = k_codes + kv_head * stride_k_head.to(tl.int64) * 16
    v_base = v_pairs + kv_head * stride_v_head.to(tl.int64) * 8
    for start in tl.range(begin, last, TILE, num_stages=STAGES):
        token = start + tl.arange(0, TILE)
        # Past the end the last token is read again: stale bytes may be NaN, and 0 * NaN is NaN.
        place = tl.minimum(token, last - 1)
        page = tl.load(table + place // PAGE_SIZE).to(tl.int64)
        offset = place % PAGE_SIZE
        k_row = (page * stride_k_page + offset * stride_k_token)[:, None] * 16
        v_row = (page * stride_v_page + offset * stride_v_token)[:, None] * 8
        if K_COLUMNS == K_DIM:
            keys = tl.load(k_base + k_row + k_column[None, :])
        else:
            keys = tl.load(k_base + k_row + k_column[None, :], mask=k_exists, other=0)
        if 2 * V_PAIRS == V_DIM:
            values = tl.load(v_base + v_row + v_pair[None, :])
        else:
            values = tl.load(v_base + v_row + v_pair[None, :], mask=v_exists, other=0)
        keys = _decode_codes(keys, FORMAT, NATIVE)
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
        even_values, odd_values = _decode_pairs(values, FORMAT, NATIVE)
        weights = weights.to(tl.float16)
        even = tl.dot(weights, even_values, even * decay[:, None])
        odd = tl.dot(weights, odd_values, odd * decay[:, None])

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
    weight = tl.load(v_scale + kv_head * v_scale_step) * unit / tl.where(is_empty, 1.0, total)
    output = tl.join(even * weight[:, None], odd * weight[:, None])
    output = tl.reshape(output, [HEADS, 2 * V_PAIRS])
    column = tl.arange(0, 2 * V_PAIRS)
    out_row = batch * stride_result_batch + head * stride_result_head + split * stride_result_split
    out_exists = is_head[:, None] & (column < V_DIM)[None, :]
    out_place = result + out_row[:, None] + column[None, :]
    tl.store(out_place, output.to(result.dtype.element_ty), mask=out_exists)
    if log_sum is not None:
        logarithm = base + tl.log2(tl.where(is_empty, 1.0, total))
        if FINAL:
            logarithm = tl.where(is_empty, float("-inf"), logarithm * _LN_2)
        tl.store(log_sum + lse_place, logarithm, mask=is_head)
