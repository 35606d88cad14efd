"""The plain Triton kernel of :mod:`fp8kv.kernels.extend`, for every GPU without a kernel of its own.

A program computes BLOCK_M query rows of one KV head. Row r of a head is query head ``r % GROUP`` of new token
``r // GROUP``: the heads of a group are packed, so that a key tile, once widened to FP16, serves all of them, and
causality cuts tiles per token and not per BLOCK_M tokens. Keys come in two segments, the paged prefix and the new tokens;
in each, tiles that every row sees in full run without masks. An unquantised cache is multiplied in its own dtype.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fp8kv.kernels.cast import next_exponent, power_of_two
from fp8kv.kernels.extend_arguments import ExtendArguments
from fp8kv.kernels.layout import kernel_view

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))
_FP16_MAX = tl.constexpr(65504.0)


@triton.jit(do_not_specialize=["window", "stride_table"])
def extend_kernel(
    query, key, value, k_cache, v_cache, page_table, prefix_lens, cu_seqlens, k_scale, v_scale,
    sinks, out, lse, sm_scale, soft_cap, window,
    stride_q_token, stride_q_head, stride_k_token, stride_k_head, stride_v_token, stride_v_head,
    stride_kc_page, stride_kc_token, stride_kc_head, stride_vc_page, stride_vc_token, stride_vc_head,
    stride_table, stride_o_token, stride_o_head, stride_lse_token, stride_lse_head,
    GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, K_DIM: tl.constexpr, K_MAIN: tl.constexpr,
    K_TAIL: tl.constexpr, V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, K_PER_HEAD: tl.constexpr,
    V_PER_HEAD: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Compute BLOCK_M query rows; the arguments are those of ``extend``, with absent tensors None."""
    kv_head = tl.program_id(1)
    batch = tl.program_id(2)
    start = tl.load(cu_seqlens + batch).to(tl.int64)
    new_tokens = (tl.load(cu_seqlens + batch + 1) - start).to(tl.int32)
    # Late rows see the most keys: they go first, and the short ones fill up the end.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if first_row >= new_tokens * GROUP:
        return
    prefix = tl.load(prefix_lens + batch)
    row = first_row + tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    in_rows = token < new_tokens
    first_token = first_row // GROUP
    last_token = tl.minimum((first_row + BLOCK_M - 1) // GROUP, new_tokens - 1)

    CODES: tl.constexpr = FORMAT != "none"
    q_place = query + (start + token) * stride_q_token + head * stride_q_head
    main = tl.arange(0, K_MAIN)
    queries = tl.load(q_place[:, None] + main[None, :], mask=in_rows[:, None], other=0.0)
    query_tail = 0
    if CODES:
        queries = queries.to(tl.float32)
        largest = tl.max(tl.abs(queries), 1)
    if K_TAIL:
        tail = K_MAIN + tl.arange(0, K_TAIL)
        in_tail = in_rows[:, None] & (tail < K_DIM)[None, :]
        query_tail = tl.load(q_place[:, None] + tail[None, :], mask=in_tail, other=0.0)
        if CODES:
            query_tail = query_tail.to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(query_tail), 1))
    if CODES:
        # BF16 becomes FP16 without loss once the row's largest magnitude lies in [2^14, 2^15).
        exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 127, -100)
        lift = power_of_two(14 - exponent)[:, None]
        if K_TAIL:
            query_tail = (query_tail * lift).to(tl.float16)
        queries = (queries * lift).to(tl.float16)
        row_factor = power_of_two(exponent - 14) * (sm_scale * _LOG2_E)
        k_unit = tl.load(k_scale + kv_head * K_PER_HEAD)
        v_unit = tl.load(v_scale + kv_head * V_PER_HEAD)
    else:
        row_factor = tl.full([BLOCK_M], sm_scale * _LOG2_E, tl.float32)
        k_unit, v_unit = 1.0, 1.0
    # Finite, so that -inf of a masked score minus the maximum is never NaN.
    peak = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, V_BLOCK], tl.float32)
    for SEGMENT in tl.static_range(2):
        if (SEGMENT == 0 and k_cache is not None) or (SEGMENT == 1 and key is not None):
            # In a segment's own coordinates: the first and last row's position, and how many keys it has.
            k_factor, v_factor = 1.0, 1.0
            if SEGMENT == 0:
                offset = prefix
                limit = prefix if key is not None else prefix + new_tokens
                keys = k_cache + kv_head.to(tl.int64) * stride_kc_head
                values = v_cache + kv_head.to(tl.int64) * stride_vc_head
                k_stride = stride_kc_token
                v_stride = stride_vc_token
                table = page_table + batch.to(tl.int64) * stride_table
            else:
                offset = 0
                limit = new_tokens
                keys = key + start * stride_k_token + kv_head * stride_k_head
                values = value + start * stride_v_token + kv_head * stride_v_head
                k_stride = stride_k_token
                v_stride = stride_v_token
                table = cu_seqlens
                if CODES and key.dtype.element_ty != tl.uint8:
                    # Multiplied by a power of two near 1 / scale, BF16 fits FP16 without loss. From here on one
                    # unit of K's and V's tiles is that power, not the scale.
                    k_exponent = next_exponent(k_unit)
                    v_exponent = next_exponent(v_unit)
                    k_factor = power_of_two(-k_exponent)
                    v_factor = power_of_two(-v_exponent)
                    k_unit = power_of_two(k_exponent)
                    accumulator = accumulator * (v_unit * v_factor)
                    v_unit = power_of_two(v_exponent)
            begin = 0
            end = limit
            full_end = limit // BLOCK_N
            if CAUSAL:
                end = tl.minimum(limit, offset + last_token + 1)
                full_end = tl.minimum(limit, offset + first_token + 1) // BLOCK_N
            if WINDOW:
                begin = tl.maximum(offset + first_token - window + 1, 0)
            first_tile = begin // BLOCK_N
            last_tile = tl.maximum(tl.cdiv(end, BLOCK_N), first_tile)
            full_begin = first_tile
            if WINDOW:
                full_begin = tl.cdiv(tl.maximum(offset + last_token - window + 1, 0), BLOCK_N)
            full_begin = tl.minimum(full_begin, last_tile)
            full_end = tl.minimum(tl.maximum(full_end, full_begin), last_tile)
            for PART in tl.static_range(3):
                if PART != 0 or WINDOW:
                    from_tile = (first_tile, full_begin, full_end)[PART]
                    to_tile = (full_begin, full_end, last_tile)[PART]
                    accumulator, total, peak = _attend(
                        accumulator, total, peak, queries, query_tail, row_factor * k_unit, offset + token,
                        from_tile, to_tile, limit, keys, values, table, stride_kc_page, k_stride,
                        stride_vc_page, v_stride, k_factor, v_factor, window, soft_cap,
                        PAGE_SIZE if SEGMENT == 0 else 0, K_TAIL, K_DIM, V_DIM, BLOCK_N,
                        CAUSAL, WINDOW, SOFT_CAP, PART != 1, FORMAT,
                    )  # fmt: skip

    if sinks is not None:
        sink = tl.load(sinks + head) * _LOG2_E
        new_peak = tl.maximum(peak, sink)
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.exp2(sink - new_peak)
        accumulator = accumulator * decay[:, None]
        peak = new_peak
    # A row without keys has a total of 0: its output is 0 and its log-sum-exp -inf.
    divisor = tl.where(total > 0.0, total, 1.0)
    scaled = accumulator * (v_unit / divisor)[:, None]
    column = tl.arange(0, V_BLOCK)
    place = out + (start + token) * stride_o_token + head * stride_o_head
    mask = in_rows[:, None] & (column < V_DIM)[None, :]
    tl.store(place[:, None] + column[None, :], scaled.to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        log_sum = tl.where(total > 0.0, (peak + tl.log2(divisor)) * _LN_2, float("-inf"))
        lse_place = lse + (start + token) * stride_lse_token + head * stride_lse_head
        tl.store(lse_place, log_sum, mask=in_rows)


def launch(arguments: ExtendArguments) -> None:
    """Launch the kernel on checked arguments."""
    call = arguments
    k_main = 1 << (call.k_dim.bit_length() - 1)
    k_tail = max(triton.next_power_of_2(call.k_dim - k_main), 16) if call.k_dim > k_main else 0
    # On narrower tiles of V, ptxas 12.8 (Triton 3.6, 3.7) takes an unset register for their address.
    v_block = max(triton.next_power_of_2(call.v_dim), 64)
    config = _config(k_main + k_tail + v_block, call.is_quantised, call.query.device)
    rows = triton.cdiv(call.max_new_tokens * call.group, config["BLOCK_M"])
    sources = [None if tensor is None else kernel_view(tensor) for tensor in call.sources]
    extend_kernel[rows, call.kv_heads, call.prefix_lens.shape[0]](
        call.query, *sources, call.page_table, call.prefix_lens, call.cu_seqlens,
        call.k_scale, call.v_scale, call.sinks, call.out, call.lse,
        call.sm_scale, call.soft_cap or 1.0, call.window or 0, *call.strides(*sources),
        GROUP=call.group, PAGE_SIZE=call.page_size, K_DIM=call.k_dim, K_MAIN=k_main, K_TAIL=k_tail,
        V_DIM=call.v_dim, V_BLOCK=v_block, K_PER_HEAD=call.k_scale.numel() > 1,
        V_PER_HEAD=call.v_scale.numel() > 1, CAUSAL=call.causal, WINDOW=call.window is not None,
        SOFT_CAP=call.soft_cap is not None, FORMAT=_format(call), **config,
    )  # fmt: skip


def _format(arguments: ExtendArguments) -> str:
    """Name the codes' format, if any, and whether to take them apart as bits: not every GPU's Triton knows it."""
    codes = arguments.k_cache if arguments.k_cache is not None else arguments.keys
    if not arguments.is_quantised:
        return "none"
    if codes.dtype == torch.float8_e5m2:
        return "e5m2"
    if codes.dtype == torch.float8_e4m3fnuz:
        return "e4m3fnuz bits"
    device = arguments.query.device
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    knows = not is_nvidia or torch.cuda.get_device_capability(device) >= (8, 9)
    return "e4m3fn" if knows else "e4m3fn bits"


def _config(width: int, quantised: bool, device: torch.device) -> dict[str, int]:
    """Return the tiles for K and V of ``width`` columns together: what fits, unspilt, and is fastest of that."""
    if device.type == "cuda" and torch.version.hip is not None:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
    generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if generation in (9, 10):
        if generation == 9 and not quantised and width <= 256:
            return {"BLOCK_M": 256, "BLOCK_N": 64, "num_warps": 16, "num_stages": 3}
        block_n = 128 if width <= 256 else 64 if width <= 384 else 32
        return {"BLOCK_M": 128, "BLOCK_N": block_n, "num_warps": 8, "num_stages": 2}
    block_n = 64 if width <= 256 else 32
    return {"BLOCK_M": 64, "BLOCK_N": block_n, "num_warps": 8, "num_stages": 2}


@triton.jit
def _attend(
    accumulator, total, peak, query, query_tail, row_factor, row_position,
    first_tile, last_tile, limit, keys, values, table,
    stride_k_page, stride_k_token, stride_v_page, stride_v_token, k_factor, v_factor, window, soft_cap,
    PAGE_SIZE: tl.constexpr, K_TAIL: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    MASKED: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Let the rows attend to tiles ``first_tile`` to ``last_tile`` of one segment; PAGE_SIZE 0 means: not paged."""
    main = tl.arange(0, query.shape[1])
    out_dims = tl.arange(0, accumulator.shape[1])
    for tile in range(first_tile, last_tile):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < limit
        if PAGE_SIZE:
            page = tl.load(table + column // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
            k_row = page * stride_k_page + (column % PAGE_SIZE) * stride_k_token
            v_row = page * stride_v_page + (column % PAGE_SIZE) * stride_v_token
        else:
            k_row = column.to(tl.int64) * stride_k_token
            v_row = column.to(tl.int64) * stride_v_token
        k_place = keys + k_row[:, None] + main[None, :]
        if MASKED:
            # Stale bytes may be NaN, and 0 * NaN is NaN: what is not a token is not read, neither of K nor of V.
            key = tl.load(k_place, mask=inside[:, None], other=0.0)
        else:
            key = tl.load(k_place)
        score = tl.dot(query, tl.trans(_operand(key, k_factor, FORMAT)))
        if K_TAIL:
            tail = query.shape[1] + tl.arange(0, K_TAIL)
            in_tail = inside[:, None] & (tail < K_DIM)[None, :]
            key_tail = tl.load(keys + k_row[:, None] + tail[None, :], mask=in_tail, other=0.0)
            score = tl.dot(query_tail, tl.trans(_operand(key_tail, k_factor, FORMAT)), score)
        if SOFT_CAP:
            grown = tl.exp2(score * (row_factor * (2.0 / soft_cap))[:, None])
            score = (soft_cap * _LOG2_E) * (1.0 - 2.0 / (grown + 1.0))
        else:
            score = score * row_factor[:, None]
        if MASKED:
            seen = inside[None, :]
            if CAUSAL:
                seen = seen & (column[None, :] <= row_position[:, None])
            if WINDOW:
                seen = seen & (column[None, :] > row_position[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        decay = tl.exp2(peak - new_peak)
        weight = tl.exp2(score - new_peak[:, None])
        total = total * decay + tl.sum(weight, 1)
        peak = new_peak
        v_place = values + v_row[:, None] + out_dims[None, :]
        if MASKED or accumulator.shape[1] != V_DIM:
            in_v = inside[:, None] & (out_dims < V_DIM)[None, :]
            value = tl.load(v_place, mask=in_v, other=0.0)
        else:
            value = tl.load(v_place)
        accumulator = tl.dot(
            weight.to(query.dtype), _operand(value, v_factor, FORMAT), accumulator * decay[:, None]
        )
    return accumulator, total, peak


@triton.jit
def _operand(x, factor, FORMAT: tl.constexpr):
    """Return FP16 of codes, which come as bytes, exact, and of ``factor`` times wider numbers, which saturate.

    Over an unquantised cache they are what is to be multiplied as they are.
    """
    if FORMAT == "none":
        return x
    elif x.dtype != tl.uint8:
        scaled = x.to(tl.float32) * factor
        return tl.minimum(tl.maximum(scaled, -_FP16_MAX), _FP16_MAX).to(tl.float16)
    elif FORMAT == "e4m3fn":
        return x.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif FORMAT == "e5m2":
        return x.to(tl.float8e5, bitcast=True).to(tl.float16)
    else:
        # The same bits as FP16 are smaller by the distance of the exponents' biases.
        code = x.to(tl.uint16)
        half = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True)
        if FORMAT == "e4m3fnuz bits":
            return tl.where(code == 0x80, float("nan"), half * 128.0).to(tl.float16)
        else:
            return tl.where((code & 0x7F) == 0x7F, float("nan"), half * 256.0).to(tl.float16)
