"""The plain Triton kernel of :mod:`fp8kv.kernels.decode_mla`, for every GPU without a kernel of its own.

A program computes 16 query heads over one split of a sequence. A tile of the cache is read once, as 16-bit pairs of
codes (columns 2c and 2c + 1), and serves as K and as V: V's even and odd columns are two operands of half the width,
because only 16-bit elements can be transposed on their way out of shared memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from fp8kv.kernels.cast import BIT_UNITS, decode, decode_bits, decodes_natively
from fp8kv.kernels.fp8 import format_of

# Query heads of a program, and tokens that it handles at a time; half of them where more would not fit in registers.
HEADS_PER_PROGRAM = 16
TILE_TOKENS = 64

_LOG2_E = math.log2(math.e)
# P is 2^14 times the probability relative to the running maximum, so that tokens far below an attention sink are no
# subnormal numbers in FP16.
_P_EXPONENT = tl.constexpr(14.0)


def launch_decode_mla_portable(
    query: Tensor,
    cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: Tensor,
    *,
    sm_scale: float,
    num_splits: int,
    result: Tensor,
    log_sum: Tensor | None,
    pdl: bool,
) -> None:
    """Attend every query to every split of its sequence. Checks nothing.

    Args:
        query: [batch, heads, 576], bfloat16 or float16: the absorbed latent part, then the rope part.
        cache: [pages, page_size, 576] FP8 codes, page_size a power of two.
        page_table: [batch, max_pages] int32; entries past a sequence's last page are not read.
        seq_lens: [batch] int32, in tokens.
        scale: float32 of one element, of K and V.
        sm_scale: factor of the scores.
        num_splits: parts of a sequence, each a whole number of tiles.
        result: [batch, heads, num_splits, 512] to fill, of :func:`fp8kv.kernels.outputs.stage_one_outputs`.
        log_sum: [batch, heads, num_splits] to fill, or None, likewise.
        pdl: let the kernel behind this one start while the last programs end.
    """
    batch, heads, _ = query.shape
    head_blocks = -(-heads // HEADS_PER_PROGRAM)
    page_size = cache.shape[1]
    native = decodes_natively(cache.dtype, cache.device)
    blackwell = native and torch.cuda.get_device_capability(cache.device) >= (10, 0)
    _decode_kernel[(batch * num_splits * head_blocks,)](
        query,
        cache.view(torch.uint8),
        cache.view(torch.uint16),
        page_table,
        seq_lens,
        scale,
        result,
        log_sum,
        sm_scale * _LOG2_E,
        1.0 if native else BIT_UNITS[cache.dtype],
        1.0 / _LOG2_E if num_splits == 1 else 1.0,
        heads,
        head_blocks,
        num_splits,
        page_size.bit_length() - 1,
        query.stride(0),
        query.stride(1),
        cache.stride(0),
        cache.stride(1),
        page_table.stride(0),
        *result.stride()[:3],
        *(log_sum.stride() if log_sum is not None else (0, 0, 0)),
        BLOCK_HEADS=HEADS_PER_PROGRAM,
        BLOCK_TOKENS=TILE_TOKENS if native and not blackwell else TILE_TOKENS // 2,
        STAGES=2,
        FORMAT=format_of(cache.dtype).name,
        NATIVE=native,
        PDL=pdl,
        num_warps=4,
    )


@triton.jit(
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
def _decode_kernel(
    query,
    codes,
    pairs,
    page_table,
    seq_lens,
    scale,
    out,
    lse,
    score_scale,
    code_unit,
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
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
    NATIVE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    head = (program % head_blocks).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    split = program // head_blocks % splits
    batch = (program // head_blocks // splits).to(tl.int64)
    is_head = head < heads
    is_row = is_head[:, None]
    length = tl.load(seq_lens + batch)
    span = tl.cdiv(tl.cdiv(length, splits), BLOCK_TOKENS) * BLOCK_TOKENS
    first = span * split
    last = tl.minimum(first + span, length)
    out += batch * stride_out_batch + split * stride_out_split
    out_row = out + head[:, None] * stride_out_head
    if lse is not None:
        lse += batch * stride_lse_batch + split * stride_lse_split
    if first >= last:
        # Stage 2 leaves an empty split's output alone; the only split's output is final.
        if splits == 1:
            column = tl.arange(0, 512)
            nothing = tl.zeros([BLOCK_HEADS, 512], out.dtype.element_ty)
            tl.store(out_row + column[None, :], nothing, mask=is_row)
        if lse is not None:
            nothing = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
            tl.store(lse + head * stride_lse_head, nothing, mask=is_head)
        return

    pair = tl.arange(0, 256)
    rope = tl.arange(0, 64)
    row = query + batch * stride_query_batch + head[:, None] * stride_query_head
    even_query = tl.load(row + 2 * pair[None, :], mask=is_row, other=0.0).to(tl.float32)
    odd_query = tl.load(row + 2 * pair[None, :] + 1, mask=is_row, other=0.0).to(tl.float32)
    rope_query = tl.load(row + 512 + rope[None, :], mask=is_row, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(even_query), 1), tl.max(tl.abs(odd_query), 1))
    largest = tl.maximum(largest, tl.max(tl.abs(rope_query), 1))
    # A power of two brings the row's largest element near 2^15: BF16 turns into FP16 without losing a bit.
    exponent = tl.minimum(268 - (largest.to(tl.int32, bitcast=True) >> 23), 253)
    up = (exponent << 23).to(tl.float32, bitcast=True)[:, None]
    down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    even_query = (even_query * up).to(tl.float16)
    odd_query = (odd_query * up).to(tl.float16)
    rope_query = (rope_query * up).to(tl.float16)
    kv_scale = tl.load(scale) * code_unit
    row_factor = (down * (score_scale * kv_scale))[:, None]

    peak = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    even = tl.zeros([BLOCK_HEADS, 256], tl.float32)
    odd = tl.zeros([BLOCK_HEADS, 256], tl.float32)
    table = page_table + batch * stride_table
    for start in tl.range(first, last, BLOCK_TOKENS, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_TOKENS)
        # Past the end the last token is read again: stale bytes may be NaN, and 0 * NaN is NaN.
        place = tl.minimum(token, last - 1)
        page = tl.load(table + (place >> page_shift)).to(tl.int64)
        base = page * stride_page + (place & ((1 << page_shift) - 1)) * stride_token
        tile = tl.load(pairs + (base >> 1)[:, None] + pair[None, :])
        rope_codes = tl.load(codes + base[:, None] + 512 + rope[None, :])
        even_tile, odd_tile = _decode_pairs(tile, FORMAT, NATIVE)
        rope_tile = decode(rope_codes, FORMAT, NATIVE)
        scores = tl.dot(rope_query, tl.trans(rope_tile))
        scores = tl.dot(even_query, tl.trans(even_tile), scores)
        scores = tl.dot(odd_query, tl.trans(odd_tile), scores) * row_factor
        scores = tl.where((token < last)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        decay = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - (new_peak - _P_EXPONENT)[:, None])
        total = total * decay + tl.sum(weights, 1)
        peak = new_peak
        even = tl.dot(weights.to(tl.float16), even_tile, even * decay[:, None])
        odd = tl.dot(weights.to(tl.float16), odd_tile, odd * decay[:, None])
    if PDL:
        gdc_launch_dependents()

    factor = (kv_scale / total)[:, None]
    column = tl.arange(0, 512)
    result = tl.reshape(tl.join(even * factor, odd * factor), [BLOCK_HEADS, 512])
    tl.store(out_row + column[None, :], result.to(out.dtype.element_ty), mask=is_row)
    if lse is not None:
        log_sum = (peak - _P_EXPONENT + tl.log2(total)) * lse_unit
        tl.store(lse + head * stride_lse_head, log_sum, mask=is_head)


@triton.jit
def _decode_pairs(pairs, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """Split uint16 pairs of codes into two FP16 tensors, the low bytes' and the high bytes'."""
    if NATIVE:
        # One permutation and two conversions for four codes; shifts and masks become three times that.
        if FORMAT == "e5m2":
            return tl.inline_asm_elementwise(
                """{ .reg .b32 sorted; .reg .b16 low, high;
                prmt.b32 sorted, $2, 0, 0x3120; mov.b32 {low, high}, sorted;
                cvt.rn.f16x2.e5m2x2 $0, low; cvt.rn.f16x2.e5m2x2 $1, high; }""",
                "=r,=r,r",
                [pairs],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            return tl.inline_asm_elementwise(
                """{ .reg .b32 sorted; .reg .b16 low, high;
                prmt.b32 sorted, $2, 0, 0x3120; mov.b32 {low, high}, sorted;
                cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }""",
                "=r,=r,r",
                [pairs],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
    else:
        return decode_bits(pairs & 0xFF, FORMAT), decode_bits(pairs >> 8, FORMAT)
