"""Stage 2 of split-KV decode: put the splits' partial results of a query head together.

Contract: a split s of a (sequence, head) hands over its normalised output o_s and L_s, the logarithm to base 2 of its
sum of exponentials. The result is ``sum(o_s * 2^(L_s - L))`` with ``L = log2(sum(2^L_s) + 2^sink)``. A split without a
token has L_s = -inf, and its o_s, which stage 1 need not write, never enters the result. Where no split has a token,
the output is 0 and the log-sum-exp is that of the sink alone, -inf where there is none.

Floor: ``batch * heads * splits * dim * 4`` bytes, mostly found in L2 because stage 1 has just written them. The kernel
is bound by latency, so a program loads the logarithms and a tile [splits, dim] of outputs at once, with none waiting for
the other.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fp8kv.kernels.arguments import (
    FLOAT_TYPES,
    require,
    require_dtype,
    require_same_device,
    require_shape,
    require_unit_stride,
)
from fp8kv.kernels.pdl import launch_options, uses_pdl

# Float32 values of one [splits, dim] tile: 64 registers of each of 128 threads.
_TILE_ELEMENTS = 8192
_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))


def reference_combine(
    partial_out: Tensor,
    partial_lse: Tensor,
    out: Tensor,
    lse: Tensor | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Do what :func:`combine` does, in plain torch."""
    logits = partial_lse * math.log(2.0)
    if sinks is not None:
        sink = sinks.reshape(1, -1, 1).expand(logits.shape[0], -1, 1)
        logits = torch.cat([logits, sink], dim=-1)
    total = logits.logsumexp(-1)
    weights = (partial_lse * math.log(2.0) - total[..., None]).exp().nan_to_num(0.0)
    values = partial_out.masked_fill((partial_lse == -math.inf)[..., None], 0.0)
    out.copy_((weights[..., None] * values).sum(-2))
    if lse is not None:
        lse.copy_(total)


@triton.jit(do_not_specialize=["heads", "splits", "stride_lse_batch", "stride_lse_head"])
def _combine_kernel(
    partial_out,
    partial_lse,
    out,
    lse,
    sinks,
    heads,
    splits,
    dim,
    stride_out_batch,
    stride_out_head,
    stride_lse_batch,
    stride_lse_head,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    batch = row // heads
    head = row % heads
    columns = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    in_dim = columns < dim
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # The sink stands in the running maximum and sum from the start, as a split without output.
    if sinks is not None:
        peak = tl.load(sinks + head).to(tl.float32) * _LOG2_E
        total = tl.full([], 1.0, tl.float32)
    else:
        peak = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
    result = tl.zeros([BLOCK_DIM], tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        exists = split < splits
        logs = tl.load(partial_lse + row * splits + split, mask=exists, other=float("-inf"))
        tile = tl.load(
            partial_out + (row * splits + split)[:, None] * dim + columns[None, :],
            mask=exists[:, None] & in_dim[None, :],
            other=0.0,
        )
        new_peak = tl.maximum(peak, tl.max(logs, 0))
        # -inf - -inf is NaN: until a split has a token, any finite number serves as the reference.
        reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(logs - reference)
        decay = tl.exp2(peak - reference)
        # What a split without tokens left in its row may be NaN, and 0 * NaN is NaN.
        tile = tl.where((logs > float("-inf"))[:, None], tile, 0.0)
        result = result * decay + tl.sum(tile * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        peak = new_peak
    result = result / tl.where(total > 0.0, total, 1.0)
    place = out + batch * stride_out_batch + head * stride_out_head + columns
    tl.store(place, result.to(out.dtype.element_ty), mask=in_dim)
    if lse is not None and tl.program_id(1) == 0:
        log_sum = (peak + tl.log2(tl.where(total > 0.0, total, 1.0))) * _LN_2
        log_sum = tl.where(total > 0.0, log_sum, float("-inf"))
        tl.store(lse + batch * stride_lse_batch + head * stride_lse_head, log_sum)


def combine(
    partial_out: Tensor,
    partial_lse: Tensor,
    out: Tensor,
    lse: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    pdl: bool = False,
) -> None:
    """Combine the partial results of all splits into ``out`` and ``lse``.

    Args:
        partial_out: [batch, heads, splits, dim] float32, contiguous; each split normalised, V's scale applied.
        partial_lse: [batch, heads, splits] float32, contiguous, in log2 units; -inf marks a split without tokens,
            whose row of ``partial_out`` may hold anything.
        out: [batch, heads, dim], bfloat16, float16 or float32, to be filled; any strides but the last.
        lse: [batch, heads] float32, to be filled with the natural logarithm, sinks included; any strides.
        sinks: [heads] float32, natural logits that join the denominator only.
        pdl: launch before the kernel in front has ended, wait for it on the device, and let the one behind do the
            same, where the GPU can.

    Raises:
        KernelArgumentError: an argument's shape, dtype, device or stride does not fit.
    """
    _check(partial_out, partial_lse, out, lse, sinks)
    batch, heads, splits, dim = partial_out.shape
    if batch * heads == 0:
        return
    block_splits = min(triton.next_power_of_2(splits), 256)
    block_dim = min(triton.next_power_of_2(dim), _TILE_ELEMENTS // block_splits)
    # A small batch has fewer rows than the GPU has multiprocessors: cut the rows.
    while block_dim > 16 and block_splits > 8 and batch * heads * (dim // block_dim) < 128:
        block_dim //= 2
    num_warps = min(max(block_splits * block_dim // 1024, 1), 4)
    overlaps = uses_pdl(pdl, out.device)
    _combine_kernel[(batch * heads, triton.cdiv(dim, block_dim))](
        partial_out,
        partial_lse,
        out,
        lse,
        sinks,
        heads,
        splits,
        dim,
        out.stride(0),
        out.stride(1),
        lse.stride(0) if lse is not None else 0,
        lse.stride(1) if lse is not None else 0,
        BLOCK_SPLITS=block_splits,
        BLOCK_DIM=block_dim,
        PDL=overlaps,
        num_warps=num_warps,
        **launch_options(overlaps),
    )


def _check(
    partial_out: Tensor,
    partial_lse: Tensor,
    out: Tensor,
    lse: Tensor | None,
    sinks: Tensor | None,
) -> None:
    require_same_device(
        partial_out=partial_out, partial_lse=partial_lse, out=out, lse=lse, sinks=sinks
    )
    require_shape("partial_out", partial_out, (None, None, None, None))
    batch, heads, splits, dim = partial_out.shape
    require(splits > 0, "the number of splits", splits, "at least 1")
    require_shape("partial_lse", partial_lse, (batch, heads, splits))
    require_shape("out", out, (batch, heads, dim))
    require_dtype("partial_out", partial_out, (torch.float32,))
    require_dtype("partial_lse", partial_lse, (torch.float32,))
    require_dtype("out", out, FLOAT_TYPES)
    require(partial_out.is_contiguous(), "partial_out", "strided", "contiguous")
    require(partial_lse.is_contiguous(), "partial_lse", "strided", "contiguous")
    require_unit_stride("out", out)
    if lse is not None:
        require_shape("lse", lse, (batch, heads))
        require_dtype("lse", lse, (torch.float32,))
    if sinks is not None:
        require_shape("sinks", sinks, (heads,))
        require_dtype("sinks", sinks, (torch.float32,))
        require_unit_stride("sinks", sinks)
