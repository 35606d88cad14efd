"""The kernel of :mod:`fp8kv.kernels.decode_mla` over an unquantised cache: what an FP8 cache is compared with.

A program computes a block of query heads over one split of a sequence, in the dtype of query and cache. A tile of the
cache is read once and is K and V. Plain Triton, on every GPU; where matrix products are done by warp groups (compute
capability 9.0), many heads share a program, so that a tile is read once for 64 of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Shape:
    """How the work is cut.

    Attributes:
        heads: query heads of a program.
        tile: tokens that it handles at a time.
        warps: of a program.
        stages: depth of the software pipeline.
        programs_per_sm: how many run on one multiprocessor at a time.
    """

    heads: int
    tile: int
    warps: int
    stages: int
    programs_per_sm: int


def choose_shape(heads: int, device: torch.device) -> Shape:
    """Return how the work is cut for queries of so many heads."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if is_nvidia and torch.cuda.get_device_capability(device)[0] == 9:
        if heads > 16:
            return Shape(heads=64, tile=64, warps=8, stages=2, programs_per_sm=1)
        return Shape(heads=16, tile=64, warps=4, stages=2, programs_per_sm=2)
    return Shape(heads=16, tile=32, warps=4, stages=2, programs_per_sm=2)


def launch_decode_mla_unquantised(
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
        cache: [pages, page_size, 576] of the query's dtype, page_size a power of two.
        page_table: [batch, max_pages] int32; entries past a sequence's last page are not read.
        seq_lens: [batch] int32, in tokens.
        scale: not read: an unquantised cache has none.
        sm_scale: factor of the scores.
        num_splits: parts of a sequence, each a whole number of tiles.
        result: [batch, heads, num_splits, 512] to fill, of :func:`fp8kv.kernels.outputs.stage_one_outputs`.
        log_sum: [batch, heads, num_splits] to fill, or None, likewise.
        pdl: let the kernel behind this one start while the last programs end.
    """
    heads = query.shape[1]
    shape = choose_shape(heads, query.device)
    head_blocks = -(-heads // shape.heads)
    _decode_kernel[(query.shape[0] * num_splits * head_blocks,)](
        query,
        cache,
        page_table,
        seq_lens,
        result,
        log_sum,
        sm_scale * _LOG2_E,
        1.0 / _LOG2_E if num_splits == 1 else 1.0,
        heads,
        head_blocks,
        num_splits,
        cache.shape[1].bit_length() - 1,
        *query.stride()[:2],
        # In units of 16 elements: so the compiler knows that rows are aligned.
        *(stride // 16 for stride in cache.stride()[:2]),
        page_table.stride(0),
        *result.stride()[:3],
        *(log_sum.stride() if log_sum is not None else (0, 0, 0)),
        BLOCK_HEADS=shape.heads,
        BLOCK_TOKENS=shape.tile,
        STAGES=shape.stages,
        PDL=pdl,
        num_warps=shape.warps,
    )


@triton.jit(
    do_not_specialize=[
        "heads", "head_blocks", "splits", "page_shift", "stride_table",
        "stride_lse_batch", "stride_lse_head", "stride_lse_split",
    ]
)  # fmt: skip
def _decode_kernel(
    query, cache, page_table, seq_lens, out, lse, score_scale, lse_unit,
    heads, head_blocks, splits, page_shift,
    stride_query_batch, stride_query_head, stride_page, stride_token, stride_table,
    stride_out_batch, stride_out_head, stride_out_split,
    stride_lse_batch, stride_lse_head, stride_lse_split,
    BLOCK_HEADS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    head = (program % head_blocks).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    split = program // head_blocks % splits
    batch = (program // head_blocks // splits).to(tl.int64)
    is_head = head < heads
    length = tl.load(seq_lens + batch)
    span = tl.cdiv(tl.cdiv(length, splits), BLOCK_TOKENS) * BLOCK_TOKENS
    first = span * split
    last = tl.minimum(first + span, length)

    column = tl.arange(0, 512)
    rope = tl.arange(0, 64)
    row = query + batch * stride_query_batch + head[:, None] * stride_query_head
    latent_query = tl.load(row + column[None, :], mask=is_head[:, None], other=0.0)
    rope_query = tl.load(row + 512 + rope[None, :], mask=is_head[:, None], other=0.0)
    # Finite, so that an empty split's peak less itself is 0.
    peak = tl.full([BLOCK_HEADS], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    sums = tl.zeros([BLOCK_HEADS, 512], tl.float32)
    table = page_table + batch * stride_table
    for start in tl.range(first, last, BLOCK_TOKENS, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_TOKENS)
        # Past the end the last token is read again: stale bytes may be NaN, and 0 * NaN is NaN.
        place = tl.minimum(token, last - 1)
        page = tl.load(table + (place >> page_shift)).to(tl.int64)
        offset = place & ((1 << page_shift) - 1)
        base = (cache + (page * stride_page + offset * stride_token) * 16)[:, None]
        tile = tl.load(base + column[None, :])
        rope_tile = tl.load(base + 512 + rope[None, :])
        scores = tl.dot(latent_query, tl.trans(tile))
        scores = tl.dot(rope_query, tl.trans(rope_tile), scores) * score_scale
        scores = tl.where((token < last)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        decay = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - new_peak[:, None])
        total = total * decay + tl.sum(weights, 1)
        peak = new_peak
        sums = tl.dot(weights.to(tile.dtype), tile, sums * decay[:, None])
    if PDL:
        gdc_launch_dependents()

    is_empty = total == 0.0
    result = sums / tl.where(is_empty, 1.0, total)[:, None]
    out_row = out + batch * stride_out_batch + split * stride_out_split + head * stride_out_head
    place = out_row[:, None] + column[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=is_head[:, None])
    if lse is not None:
        log_sum = (peak + tl.log2(tl.where(is_empty, 1.0, total))) * lse_unit
        log_sum = tl.where(is_empty, float("-inf"), log_sum)
        lse_place = lse + batch * stride_lse_batch + split * stride_lse_split
        tl.store(lse_place + head * stride_lse_head, log_sum, mask=is_head)
