"""Gather paged FP8 keys and values into contiguous BF16, FP16 or float32, K and V in one launch.

Contract: row ``cu_seqlens[b] + i`` of the output is position ``starts[b] + i`` of sequence b, each element
``float32(code) * scale``, rounded once to the type of the output. Page-table entries that no token needs are never
read, and neither are pages that they name. Rows from ``cu_seqlens[-1]`` on keep what they held.

Floor: 1 byte read and 2 (or 4) written for each element. A block of tokens belongs to one sequence; a program finds
the sequence itself, from ``cu_seqlens`` on the device.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fp8kv.kernels.arguments import (
    FLOAT_TYPES,
    FP8_TYPES,
    require,
    require_dtype,
    require_same_device,
    require_scale,
    require_shape,
    require_unit_stride,
)
from fp8kv.kernels.fp8 import dequantize
from fp8kv.kernels.gather_kernel import launch_gather
from fp8kv.kernels.layout import MAX_PAGE_SIZE, is_page_size, slots_of


def reference_gather(
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    total_tokens: int,
    starts: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out_k: Tensor | None = None,
    out_v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what :func:`gather` returns, in plain torch; new rows past the last token are 0."""
    results = []
    for cache, scale, out in ((k_cache, k_scale, out_k), (v_cache, v_scale, out_v)):
        if out is None:
            out = cache.new_zeros(total_tokens, *cache.shape[2:], dtype=dtype)
        bounds = cu_seqlens.clamp(max=total_tokens).tolist()
        for b, (begin, end) in enumerate(pairwise(bounds)):
            positions = torch.arange(end - begin, device=cache.device)
            if starts is not None:
                positions += starts[b]
            slots = slots_of(page_table[b], positions, cache.shape[1])
            codes = cache[slots // cache.shape[1], slots % cache.shape[1]]
            out[begin:end] = dequantize(codes, scale.reshape(-1, 1), out.dtype)
        results.append(out)
    return results[0], results[1]


def reference_gather_rows(
    cache: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    scale: Tensor,
    *,
    total_tokens: int,
    starts: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Return what :func:`gather_rows` returns, in plain torch; new rows past the last token are 0."""
    rows = cache[:, :, None]
    result, _ = reference_gather(
        rows,
        rows[..., :0],
        page_table,
        cu_seqlens,
        scale,
        scale,
        total_tokens=total_tokens,
        starts=starts,
        dtype=dtype,
        out_k=None if out is None else out[:, None],
    )
    return result[:, 0]


def gather(
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    total_tokens: int,
    starts: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out_k: Tensor | None = None,
    out_v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather the keys and the values of sequences from a paged FP8 cache.

    Page table, lengths, starts and scales are read on the device: all may change between replays of a CUDA graph.

    Args:
        k_cache: [pages, page_size, kv_heads, k_dim] FP8; any strides but the last.
        v_cache: [pages, page_size, kv_heads, v_dim], of the dtype of ``k_cache``; any strides but the last.
        page_table: [batch, max_pages] int32, the pages of each sequence in order; any stride of its rows.
        cu_seqlens: [batch + 1] int32, 0 and the running sum of how many tokens to gather from each sequence.
        k_scale: float32, one element or [kv_heads]; value = code * scale.
        v_scale: the same for V.
        total_tokens: at least ``cu_seqlens[-1]``; tokens beyond it are left out.
        starts: [batch] int32, the position of each sequence's first token to gather; 0 where not given.
        dtype: bfloat16, float16 or float32, of outputs that are not given.
        out_k: [total_tokens, kv_heads, k_dim], to be filled; any strides but the last.
        out_v: [total_tokens, kv_heads, v_dim], to be filled; any strides but the last.

    Returns:
        Keys and values, ``out_k`` and ``out_v`` where given; new rows from ``cu_seqlens[-1]`` on are uninitialised.

    Raises:
        KernelArgumentError: an argument's shape, dtype, device or stride does not fit.
    """
    _check_cache("k_cache", k_cache, 4)
    _check_cache("v_cache", v_cache, 4)
    require_dtype("v_cache", v_cache, (k_cache.dtype,))
    require_shape("v_cache", v_cache, (*k_cache.shape[:3], None))
    for name, given in (("k_scale", k_scale), ("v_scale", v_scale)):
        require_scale(name, given, k_cache.shape[2])
    out_k = _output("out_k", out_k, k_cache, total_tokens, dtype)
    out_v = _output("out_v", out_v, v_cache, total_tokens, dtype)
    _check_places(page_table, cu_seqlens, starts)
    require_same_device(
        k_cache=k_cache,
        v_cache=v_cache,
        page_table=page_table,
        cu_seqlens=cu_seqlens,
        k_scale=k_scale,
        v_scale=v_scale,
        starts=starts,
        out_k=out_k,
        out_v=out_v,
    )
    launch_gather(
        [(k_cache, k_scale, out_k), (v_cache, v_scale, out_v)], page_table, cu_seqlens, starts
    )
    return out_k, out_v


def gather_rows(
    cache: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    scale: Tensor,
    *,
    total_tokens: int,
    starts: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Gather the rows of sequences from the paged FP8 cache of multi-head latent attention.

    Args:
        cache: [pages, page_size, dim] FP8, a row being latent and rope part; any strides but the last.
        page_table: as in :func:`gather`, and so are ``cu_seqlens``, ``total_tokens``, ``starts`` and ``dtype``.
        cu_seqlens: [batch + 1] int32.
        scale: float32, one element.
        total_tokens: at least ``cu_seqlens[-1]``.
        starts: [batch] int32.
        dtype: bfloat16, float16 or float32, where ``out`` is not given.
        out: [total_tokens, dim], to be filled; any stride of its rows.

    Returns:
        ``out``, or a new tensor whose rows from ``cu_seqlens[-1]`` on are uninitialised.

    Raises:
        KernelArgumentError: an argument's shape, dtype, device or stride does not fit.
    """
    _check_cache("cache", cache, 3)
    require_scale("scale", scale, None)
    out = _output("out", out, cache, total_tokens, dtype)
    _check_places(page_table, cu_seqlens, starts)
    require_same_device(
        cache=cache,
        page_table=page_table,
        cu_seqlens=cu_seqlens,
        scale=scale,
        starts=starts,
        out=out,
    )
    launch_gather([(cache[:, :, None], scale, out[:, None])], page_table, cu_seqlens, starts)
    return out


def _output(
    argument: str, out: Tensor | None, cache: Tensor, total_tokens: int, dtype: torch.dtype
) -> Tensor:
    """Return the output, allocated where it is not given."""
    require(total_tokens >= 0, "total_tokens", total_tokens, "at least 0")
    if out is None:
        require(dtype in FLOAT_TYPES, "dtype", dtype, "bfloat16, float16 or float32")
        return torch.empty(total_tokens, *cache.shape[2:], dtype=dtype, device=cache.device)
    require_dtype(argument, out, FLOAT_TYPES)
    require_shape(argument, out, (total_tokens, *cache.shape[2:]))
    require_unit_stride(argument, out)
    return out


def _check_cache(argument: str, cache: Tensor, dimensions: int) -> None:
    require_dtype(argument, cache, FP8_TYPES)
    require_shape(argument, cache, (None,) * dimensions)
    require_unit_stride(argument, cache)
    powers = f"a power of two up to {MAX_PAGE_SIZE}"
    require(is_page_size(cache.shape[1]), f"the page size of {argument}", cache.shape[1], powers)


def _check_places(page_table: Tensor, cu_seqlens: Tensor, starts: Tensor | None) -> None:
    require_dtype("page_table", page_table, (torch.int32,))
    require_shape("page_table", page_table, (None, None))
    require_unit_stride("page_table", page_table)
    require_dtype("cu_seqlens", cu_seqlens, (torch.int32,))
    require_shape("cu_seqlens", cu_seqlens, (page_table.shape[0] + 1,))
    require_unit_stride("cu_seqlens", cu_seqlens)
    if starts is not None:
        require_dtype("starts", starts, (torch.int32,))
        require_shape("starts", starts, (page_table.shape[0],))
        require_unit_stride("starts", starts)
