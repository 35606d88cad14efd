"""Rotary embedding of Q and K, and quantisation of K and V into their pages, in one launch.

Contract: the first ``rope_dim`` columns of each head of Q and K are rotated by their token's angle in float32, every
product and sum rounded on its own (:mod:`fp8kv.kernels.rope`; compiled without contraction to fused multiply-adds), and
the result is rounded once to the model's dtype. The other columns pass as they are. Q is returned; K, *so rounded*, and V
go to their slots as :mod:`fp8kv.kernels.cache_write` writes them. So the cache holds, bit for bit, what rotating first
and writing then would have put there, save that a model which rotates in BF16 rounds its products, too.
:mod:`fp8kv.kernels.rope_quantize` chooses otherwise: its K is never rounded to BF16.

Floor: bytes read and written. A thread takes 16 elements, the same 8 columns of both halves of a head or 8 neighbouring
pairs, and writes the places that it has read: Q may be rotated in place. V, K and Q are stretches of one grid, so that a
decode step's few tokens are spread over the GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8kv.kernels.arguments import (
    require,
    require_dtype,
    require_same_device,
    require_shape,
    require_unit_stride,
)
from fp8kv.kernels.cache_write import check_cache_write, reference_cache_write
from fp8kv.kernels.cast import plan_write
from fp8kv.kernels.layout import kernel_view
from fp8kv.kernels.pdl import launch_options, uses_pdl
from fp8kv.kernels.rope import rotate, split_columns
from fp8kv.kernels.rope_cache_write_kernel import (
    VECTOR,
    VECTORS,
    Form,
    Side,
    rotate_and_write,
)


def reference_rope_cache_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    interleaved: bool = False,
    out_q: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Do what :func:`rope_cache_write` does, in plain torch."""
    rope_dim = cos.shape[1]
    angles = torch.cat([cos[:, : rope_dim // 2], sin[:, : rope_dim // 2]], dim=-1).float()
    tokens = torch.arange(len(angles), device=angles.device)

    def rotated(heads: Tensor) -> Tensor:
        rest, rope = split_columns(heads, rope_dim, rope_last=False)
        rope = rotate(rope, tokens, angles, interleaved).to(heads.dtype)
        return torch.cat([rope, rest], dim=-1)

    reference_cache_write(rotated(key), value, k_cache, v_cache, slots, k_scale, v_scale)
    return rotated(query) if out_q is None else out_q.copy_(rotated(query))


def rope_cache_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    interleaved: bool = False,
    out_q: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Rotate Q and K, and write K and V into a paged cache, as FP8 codes unless it is unquantised.

    Angles, slots and scales are read on the device: all may change between replays of a CUDA graph.

    Args:
        query: [tokens, q_heads, k_dim] bfloat16, float16 or float32; any strides but the last, so a slice of a fused QKV
            tensor and the transposed view of [q_heads, tokens, k_dim] will do.
        key: [tokens, kv_heads, k_dim], of the dtype of ``query``; any strides but the last.
        value: [tokens, kv_heads, v_dim], likewise.
        cos: [tokens, rope_dim], the cosines of each token's angles as ``transformers`` computes them: pair p's stands in
            column p, and again in column p + rope_dim / 2, which is not read. Of the dtype of ``query`` or float32; even,
            and at most k_dim, where it is less the columns behind are not rotated. Any stride but the last.
        sin: [tokens, rope_dim], the sines, of the dtype of ``cos``.
        k_cache: [pages, page_size, kv_heads, k_dim] FP8, or bfloat16 or float16 as ``key``; changed in place. Any strides
            but the last: the transposed view of a cache ordered [pages, kv_heads, page_size, k_dim] will do.
        v_cache: [pages, page_size, kv_heads, v_dim], of the dtype of ``k_cache``.
        slots: [tokens] int32 or int64, ``page * page_size + offset``; the K and V of a negative one are not written.
        k_scale: float32, one element or [kv_heads]; value = code * scale. Not read where the cache is unquantised.
        v_scale: the same for V.
        interleaved: pair p of a head are its columns 2p and 2p + 1, rather than p and p + rope_dim / 2.
        out_q: [tokens, q_heads, k_dim], of the dtype of ``query``, to be filled; any strides but the last. May be
            ``query`` itself.
        pdl: start while the kernel in front ends (:mod:`fp8kv.kernels.pdl`).

    Returns:
        The rotated queries: ``out_q``, or a new contiguous tensor.

    Raises:
        KernelArgumentError: an argument's shape, dtype, device or stride does not fit.
    """
    _check(query, key, value, cos, sin, slots, out_q)
    check_cache_write(key, value, k_cache, v_cache, slots, k_scale, v_scale, None)
    if out_q is None:
        out_q = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    tokens = query.shape[0]
    form = _form(query, cos, k_cache, v_cache, k_scale, v_scale, interleaved)
    programs = form.programs(tokens)
    if programs == 0:
        return out_q
    overlaps = uses_pdl(pdl, query.device)
    k_pages, v_pages = kernel_view(k_cache), kernel_view(v_cache)
    rotate_and_write[(programs,)](
        Side(query, out_q, None, query.stride(0), query.stride(1), 0, *out_q.stride()[:2]),
        Side(key, k_pages, k_scale, *key.stride()[:2], *k_pages.stride()[:3]),
        Side(value, v_pages, v_scale, *value.stride()[:2], *v_pages.stride()[:3]),
        (cos, sin, cos.stride(0), sin.stride(0)),
        slots,
        tokens,
        PDL=overlaps,
        FORM=form,
        CAST=plan_write(k_cache),
        num_warps=VECTORS // 32,
        enable_fp_fusion=False,
        **launch_options(overlaps),
    )
    return out_q


def _form(
    query: Tensor,
    cos: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    interleaved: bool,
) -> Form:
    _, page_size, kv_heads, k_dim = k_cache.shape
    half, rest, v_dim = cos.shape[1] // 2, k_dim - cos.shape[1], v_cache.shape[3]
    return Form(
        interleaved=interleaved,
        half=half,
        pairs=math.gcd(half, VECTOR // 2),
        rest=rest,
        rest_vector=math.gcd(rest, VECTOR),
        v_dim=v_dim,
        v_vector=math.gcd(v_dim, VECTOR),
        q_heads=query.shape[1],
        kv_heads=kv_heads,
        page_size=page_size,
        k_per_head=k_scale.numel() > 1,
        v_per_head=v_scale.numel() > 1,
        vectors=VECTORS,
    )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    out_q: Tensor | None,
) -> None:
    require_shape("query", query, (None, None, None))
    tokens, _, dim = query.shape
    require_shape("key", key, (tokens, None, dim))
    require_shape("value", value, (tokens, None, None))
    require_shape("slots", slots, (tokens,))
    require_dtype("query", query, (key.dtype,))
    require_shape("cos", cos, (tokens, None))
    rope_dim = cos.shape[1]
    require(rope_dim % 2 == 0, "the width of cos", rope_dim, "even")
    require(0 < rope_dim <= dim, "the width of cos", rope_dim, f"from 2 to {dim}, that of query")
    require_dtype("cos", cos, tuple({query.dtype, torch.float32}))
    require_shape("sin", sin, (tokens, rope_dim))
    require_dtype("sin", sin, (cos.dtype,))
    if out_q is not None:
        require_shape("out_q", out_q, query.shape)
        require_dtype("out_q", out_q, (query.dtype,))
        require_unit_stride("out_q", out_q)
    for name, tensor in (("query", query), ("cos", cos), ("sin", sin)):
        require_unit_stride(name, tensor)
    require_same_device(key=key, query=query, cos=cos, sin=sin, out_q=out_q)
