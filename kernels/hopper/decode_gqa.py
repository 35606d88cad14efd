"""GQA decode on Hopper, stage 1: a program attends the query heads of one KV head to one split of a sequence.

Contract: as :mod:`fp8kv.kernels.decode_gqa`, whose launcher checks the arguments and runs stage 2 (``combine``).

Floor: memory, ``k_dim + v_dim`` bytes per token and KV head. What keeps the bytes coming:

- The copy engine (TMA) brings whole pages, a ring of tiles ahead. It applies the cache's strides, so both orders in
  memory are one kernel, and it costs the warps one instruction per page.
- A warp owns its tokens. It keeps all of Q and of its output in registers and shares nothing with other warps before
  the end: no softmax across warps, no barrier for it. With one warp to a program, the programs of a multiprocessor
  drift apart, and while one computes, others load. Where there is about one head to attend per multiprocessor, four
  warps share it and a fifth starts their copies: what that costs is less than a second stage.
- Tokens are the rows of the products, ``S^T = K Q^T`` and ``O^T += V^T P^T``: a group of up to 8 query heads fills the 8
  columns of the smallest matrix instruction, where heads as rows would have to fill 16.
- V is read as 16-bit pairs of codes, which ``ldmatrix`` transposes; even and odd columns are two sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fp8kv.kernels.decode_gqa_arguments import DecodeGqaArguments, StageOneOutput
from fp8kv.kernels.hopper.decode_gqa_kernel import decode_gqa_kernel
from fp8kv.kernels.pdl import launch_options
from fp8kv.kernels.splits import MAX_SPLITS, choose_splits

MIN_PAGE_SIZE = 16

# One for each of a multiprocessor's four schedulers.
_WARPS_PER_SM = 4
_SHARED_BYTES = 227 * 1024
# Bytes of a warp's tile: small ones where there is little to read, so that all can take part, and large ones, which cost
# less per byte, where a warp reads for long.
_SMALL_TILE, _LARGE_TILE = 8 * 1024, 16 * 1024
_LONG_SPLIT = 1024
_STAGES = 2


@dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
        splits: parts of a sequence.
        warps: of a program.
        warp_tokens: tokens of a tile that one warp takes.
        stages: tiles on their way or in use.
        slots: tiles that shared memory is allocated for; more than the stages only keep programs away.
        roles: a warp of its own starts the copies; for programs of 4 warps.
    """

    splits: int
    warps: int
    warp_tokens: int
    stages: int
    slots: int
    roles: bool


def supports(arguments: DecodeGqaArguments) -> bool:
    """Say whether this kernel takes these arguments, which have been checked."""
    query, codes = arguments.query, arguments.k_cache.dtype
    return (
        query.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device)[0] == 9
        and arguments.page_size >= MIN_PAGE_SIZE
        and codes in (torch.float8_e4m3fn, torch.float8_e5m2)
    )


def make_plan(arguments: DecodeGqaArguments, num_splits: int | None) -> Plan:
    """Return how the work is cut; ``num_splits`` is taken where it is given."""
    a = arguments
    token_bytes = _block(a.k_dim) + _block(a.v_dim)
    work_items = a.batch * a.kv_heads * triton.cdiv(a.group, _head_tile(a))
    large = min(_power_of_two(_LARGE_TILE // token_bytes), 64)
    sms = a.multiprocessors
    if num_splits in (None, 1) and sms * 3 // 4 <= work_items <= sms:
        # One program of four warps for each multiprocessor: nothing is cut, and there is no stage 2.
        return Plan(1, _WARPS_PER_SM, large, _STAGES, _STAGES, roles=True)
    # A single sequence and KV head cannot be cut into as many splits as the GPU has room for warps.
    warps = 2 if work_items * MAX_SPLITS < sms * _WARPS_PER_SM else 1
    warp_tokens = _power_of_two(_SMALL_TILE // token_bytes)
    splits = num_splits or choose_splits(
        work_items,
        a.longest_span,
        warps * warp_tokens,
        sms,
        ctas_per_sm=_WARPS_PER_SM // warps,
        min_tokens=warps * warp_tokens,
    )
    slots = _STAGES
    if warps == 1 and triton.cdiv(a.longest_span, splits) >= _LONG_SPLIT:
        warp_tokens = large
        # Where more programs fit on a multiprocessor than were counted on, the last wave would be a partial one.
        slots = _SHARED_BYTES // (_WARPS_PER_SM + 1) // (warp_tokens * token_bytes) + 1
    return Plan(splits, warps, warp_tokens, _STAGES, max(slots, _STAGES), roles=False)


def launch(arguments: DecodeGqaArguments, plan: Plan, output: StageOneOutput) -> None:
    """Attend every query to every split of its sequence.

    Args:
        arguments: checked, and of a kind that :func:`supports` accepts.
        plan: of :func:`make_plan`.
        output: what to fill.
    """
    a = arguments
    heads = _head_tile(a)
    row_tiles = triton.cdiv(a.group, heads)
    rows = min(a.page_size, plan.warps * plan.warp_tokens)
    log_sum = output.log_sum
    decode_gqa_kernel[(a.kv_heads * row_tiles, plan.splits, a.batch)](
        a.query,
        _descriptor(a.k_cache, rows),
        _descriptor(a.v_cache, rows),
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
        int(a.k_scale.numel() > 1),
        int(a.v_scale.numel() > 1),
        *a.query.stride()[:2],
        a.page_table.stride(0),
        *output.result.stride()[:3],
        *(log_sum.stride() if log_sum is not None else (0, 0, 0)),
        GROUP=a.group,
        ROW_TILES=row_tiles,
        HEADS=heads,
        K_DIM=a.k_dim,
        V_DIM=a.v_dim,
        K_BLOCK=_block(a.k_dim),
        V_BLOCK=_block(a.v_dim),
        WARPS=plan.warps,
        WARP_TOKENS=plan.warp_tokens,
        PAGE_SIZE=a.page_size,
        ROWS=rows,
        STAGES=plan.stages,
        SLOTS=plan.slots,
        WINDOWED=a.window is not None,
        CAPPED=a.soft_cap is not None,
        E5M2=a.k_cache.dtype == torch.float8_e5m2,
        FINAL=output.final,
        ROLES=plan.roles,
        PDL=a.pdl,
        num_warps=plan.warps,
        **launch_options(a.pdl),
    )


def _head_tile(arguments: DecodeGqaArguments) -> int:
    """Return how many query heads a program takes: 8, or 16 where the registers suffice."""
    head_dim = max(arguments.k_dim, arguments.v_dim)
    return 8 if arguments.group <= 8 or head_dim > 128 else 16


def _power_of_two(limit: int) -> int:
    """Return the largest power of two that is not above ``limit``."""
    return 1 << (limit.bit_length() - 1)


def _block(head_dim: int) -> int:
    """Return the columns of a tile; those past head_dim are filled with zeros by the copy engine."""
    return max(64, int(triton.next_power_of_2(head_dim)))


def _descriptor(cache: Tensor, rows: int) -> TensorDescriptor:
    """Describe one copy: ``rows`` tokens of a page and a head, up to 128 columns."""
    columns = min(_block(cache.shape[-1]), 128)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=columns, element_bitwidth=8, rank=4)
    return TensorDescriptor.from_tensor(cache, [1, rows, 1, columns], layout)
