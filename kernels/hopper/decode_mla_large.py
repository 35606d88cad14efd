"""MLA decode for 33 to 128 query heads on Hopper, stage 1: a program attends 64 heads to one split of a sequence.

Contract: that of :mod:`fp8kv.kernels.decode_mla`, whose launcher checks the arguments and runs stage 2
(:mod:`fp8kv.kernels.combine`). With one split the output and its natural log-sum-exp are final. With several, each split
hands over its normalised output and its log-sum-exp to base 2, -inf where it has no token; then its output row is not
written.

Floor: the matrix units. 64 tokens cost ``2 * 64 * 64 * (576 + 512)`` operations per 64 heads. Their 36 KiB of codes come
from memory, or from L2 for a second block of heads, whose program is the neighbour of the first. What holds the kernel
back is shared memory, 128 bytes a cycle: of the 3700 cycles that a tile takes, 3000 carry data (Q.K 1150, P.V 580, the
widened tile 580, its codes on their way to registers 540), while the matrix units are busy for 2200.

What a program's warps do is in :mod:`fp8kv.kernels.hopper.decode_mla_large_roles`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fp8kv.kernels.hopper.decode_mla_large_roles import (
    attend_left,
    attend_right,
    widen,
    write_empty_split,
)

HEADS_PER_PROGRAM = 64
TILE_TOKENS = 64

_LOG2_E = math.log2(math.e)
# Registers of a thread of attend_right and of widen; attend_left has the rest of three times _AVERAGE_REGISTERS. Below
# 158, wgmma with 64 x 256 sums is compiled to run one at a time. With these no loop spills, which would be costly: tiles
# leave L1 so little room that every reload comes from L2.
_WORKER_REGISTERS = (160, 120)
_AVERAGE_REGISTERS = 168


def supports(query: Tensor, cache: Tensor) -> bool:
    """Say whether this kernel takes these tensors, which fit the contract of ``decode_mla``.

    Args:
        query: [batch, heads, 576], bfloat16 or float16.
        cache: [pages, page_size, 576], FP8 codes. Rows are read 16 bytes at a time.
    """
    return (
        query.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device)[0] == 9
        and query.shape[1] > 32
        and cache.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        and cache.data_ptr() % 16 == 0
        and cache.stride(0) % 16 == 0
        and cache.stride(1) % 16 == 0
    )


def launch_decode_mla_large(
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
    """Attend every query to every split of its sequence. Checks nothing: see :func:`supports`.

    Args:
        query: [batch, heads, 576], bfloat16 or float16: the absorbed latent part, then the rope part.
        cache: [pages, page_size, 576], FP8 codes; page_size is a power of two.
        page_table: [batch, max_pages] int32; entries past a sequence's last page are not read.
        seq_lens: [batch] int32, in tokens.
        scale: float32, one element, of K and V.
        sm_scale: factor of the scores, positive.
        num_splits: parts of a sequence, each of whole tiles of 64 tokens.
        result: [batch, heads, num_splits, 512] to fill, of :func:`fp8kv.kernels.outputs.stage_one_outputs`.
        log_sum: [batch, heads, num_splits] to fill, or None, likewise.
        pdl: let the kernel behind this one start while the last programs end.
    """
    batch, heads, _ = query.shape
    page_size = cache.shape[1]
    head_blocks = -(-heads // HEADS_PER_PROGRAM)
    unit = 1.0 / _LOG2_E if num_splits == 1 else 1.0
    _decode_kernel[(batch * num_splits * head_blocks,)](
        query,
        cache,
        page_table,
        seq_lens,
        scale,
        result,
        log_sum,
        sm_scale * _LOG2_E,
        unit,
        heads,
        head_blocks,
        num_splits,
        page_size.bit_length() - 1,
        page_size - 1,
        *query.stride()[:2],
        *cache.stride()[:2],
        page_table.stride(0),
        *result.stride()[:3],
        *(log_sum.stride() if log_sum is not None else (0, 0, 0)),
        WORKER_REGISTERS=_WORKER_REGISTERS,
        PDL=pdl,
        num_warps=4,
        maxnreg=_AVERAGE_REGISTERS,
    )


@gluon.jit(
    do_not_specialize=[
        "heads", "head_blocks", "splits", "page_shift", "page_mask",
        "stride_table", "stride_lse_batch", "stride_lse_head", "stride_lse_split",
    ]
)  # fmt: skip
def _decode_kernel(
    query, cache, page_table, seq_lens, scale, out, lse, score_scale, lse_unit,
    heads, head_blocks, splits, page_shift, page_mask,
    stride_query_batch, stride_query_head, stride_page, stride_row, stride_table,
    stride_out_batch, stride_out_head, stride_out_split,
    stride_lse_batch, stride_lse_head, stride_lse_split,
    WORKER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
) -> None:  # fmt: skip
    """Find the program's tokens, lay out shared memory and set the three warp groups to work."""
    # Blocks of heads change fastest: the second reads from L2 what the first has brought there.
    program = gl.program_id(0)
    first_head = (program % head_blocks).to(gl.int64) * 64
    split = program // head_blocks % splits
    batch = (program // head_blocks // splits).to(gl.int64)
    length = gl.load(seq_lens + batch)
    span = gl.cdiv(gl.cdiv(length, splits), 64) * 64
    start = split * span
    end = gl.minimum(length, start + span)
    heads_here = heads - (program % head_blocks) * 64
    out += batch * stride_out_batch + first_head * stride_out_head + split * stride_out_split
    if lse is not None:
        lse += batch * stride_lse_batch + first_head * stride_lse_head + split * stride_lse_split
    result = (out, heads_here, stride_out_head)
    log_sum = (lse, stride_lse_head, lse_unit)
    if start >= end:
        write_empty_split(result, log_sum, splits)
        return
    tiles = gl.cdiv(end - start, 64)
    kv_scale = gl.load(scale)

    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_left = gl.allocate_shared_memory(gl.float16, [64, 256], swizzled)
    q_right = gl.allocate_shared_memory(gl.float16, [64, 256], swizzled)
    q_rope = gl.allocate_shared_memory(gl.float16, [64, 64], swizzled)
    left = gl.allocate_shared_memory(gl.float16, [2, 64, 256], swizzled)
    right = gl.allocate_shared_memory(gl.float16, [2, 64, 256], swizzled)
    rope = gl.allocate_shared_memory(gl.float16, [2, 64, 64], swizzled)
    p_tile = gl.allocate_shared_memory(gl.float16, [64, 64], swizzled)
    factors = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # One arrival completes a phase of any of them. The rope part is filled and released with the left half.
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    left_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    left_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    right_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    right_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    p_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    p_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    for stage in gl.static_range(2):
        mbarrier.init(left_full.index(stage), count=1)
        mbarrier.init(left_empty.index(stage), count=1)
        mbarrier.init(right_full.index(stage), count=1)
        mbarrier.init(right_empty.index(stage), count=1)
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_empty, count=1)

    query += batch * stride_query_batch + first_head * stride_query_head
    table = page_table + batch * stride_table
    queries = (query, stride_query_head, (q_left, q_right, q_rope))
    pages = (cache, table, page_shift, page_mask, stride_page, stride_row)
    tokens = (start, end, tiles)
    tile = (left, right, rope)
    filled = (left_full, right_full)
    released = (left_empty, right_empty)
    handed_over = (p_tile, factors, p_full, p_empty)
    scales = (score_scale * kv_scale, kv_scale)
    outputs = (result, log_sum)
    gl.warp_specialize(
        [
            (
                attend_left,
                (queries, scales, tokens, tile, filled, released, handed_over, outputs, PDL),
            ),
            (attend_right, (tokens, tile, released, handed_over, result)),
            (widen, (pages, tokens, tile, filled, released)),
        ],
        [4, 4],
        WORKER_REGISTERS,
    )
