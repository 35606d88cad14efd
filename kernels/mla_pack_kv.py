"""Expanded K and V of multi-head latent attention, quantised and packed for prefill in one launch.

Contract: ``out_k[t, h] = codes([k_nope[t, h] | k_rope[t]])`` and ``out_v[t, h] = codes(value[t, h])``, each divided
by its own scale; the rope part is rotated already and shared by all heads, or has one row per head. Codes are those
of :func:`fp8kv.kernels.quantize.quantize`, bit for bit. The inputs are taken where the projection left them:
``k_nope`` and ``value`` are usually the two halves of one tensor.

Floor: bytes read and written, 3 per element of K's own part and of V, and 1 per element of the rope part, whose input
is shared. A program takes whole heads: a row's two parts are two tiles, each with whole 16-byte accesses.
"""

from __future__ import annotations

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
    require_scale,
    require_shape,
    require_unit_stride,
)
from fp8kv.kernels.cast import plan_cast
from fp8kv.kernels.outputs import fp8_outputs
from fp8kv.kernels.pdl import launch_options, uses_pdl
from fp8kv.kernels.quantize import invert, reference_quantize, to_codes

_BLOCK_ELEMENTS = 2048


def reference_mla_pack_kv(
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    out_k: Tensor | None = None,
    out_v: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`mla_pack_kv` does, in plain torch."""
    key = torch.cat([k_nope, k_rope.expand(*k_nope.shape[:2], -1)], dim=-1)
    return (
        reference_quantize(key, k_scale, dtype=dtype, out=out_k),
        reference_quantize(value, v_scale, dtype=dtype, out=out_v),
    )


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    k_nope,
    k_rope,
    value,
    k_scale,
    v_scale,
    out_k,
    out_v,
    rows,
    heads,
    stride_nope_token,
    stride_nope_head,
    stride_rope_token,
    stride_rope_head,
    stride_value_token,
    stride_value_head,
    stride_k_scale,
    stride_v_scale,
    stride_out_k_token,
    stride_out_k_head,
    stride_out_v_token,
    stride_out_v_head,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
    CAST: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row // heads
    head = (row - token * heads).to(tl.int64)
    token = token.to(tl.int64)
    exists = (row < rows)[:, None]
    nope_column = tl.arange(0, NOPE_BLOCK)[None, :]
    rope_column = tl.arange(0, ROPE_BLOCK)[None, :]
    value_column = tl.arange(0, VALUE_BLOCK)[None, :]
    nope_mask = exists & (nope_column < NOPE)
    rope_mask = exists & (rope_column < ROPE)
    value_mask = exists & (value_column < VALUE)
    nope_place = (token * stride_nope_token + head * stride_nope_head)[:, None] + nope_column
    rope_place = (token * stride_rope_token + head * stride_rope_head)[:, None] + rope_column
    value_place = (token * stride_value_token + head * stride_value_head)[:, None] + value_column
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # Loads are issued in program order: all of them before the first is used.
    nope = tl.load(k_nope + nope_place, mask=nope_mask)
    values = tl.load(value + value_place, mask=value_mask)
    rope = tl.load(k_rope + rope_place, mask=rope_mask)
    k_inverse = invert(tl.load(k_scale + head * stride_k_scale)[:, None])
    v_inverse = invert(tl.load(v_scale + head * stride_v_scale)[:, None])
    nope_codes = to_codes(nope, k_inverse, CAST)
    rope_codes = to_codes(rope, k_inverse, CAST)
    value_codes = to_codes(values, v_inverse, CAST)
    key_row = (out_k + token * stride_out_k_token + head * stride_out_k_head)[:, None]
    value_row = (out_v + token * stride_out_v_token + head * stride_out_v_head)[:, None]
    tl.store(key_row + nope_column, nope_codes, mask=nope_mask)
    tl.store(key_row + NOPE + rope_column, rope_codes, mask=rope_mask)
    tl.store(value_row + value_column, value_codes, mask=value_mask)


def mla_pack_kv(
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    out_k: Tensor | None = None,
    out_v: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the FP8 codes of expanded K and V.

    Args:
        k_nope: [tokens, heads, nope_dim], bfloat16, float16 or float32; any strides but the last, which is 1 in all.
        k_rope: [tokens, 1, rope_dim], shared by the heads, or [tokens, heads, rope_dim]; rotated; dtype of ``k_nope``.
        value: [tokens, heads, v_dim], dtype of ``k_nope``.
        k_scale: float32 on the device, one element or ``heads``.
        v_scale: the same, for V.
        out_k: [tokens, heads, nope_dim + rope_dim], FP8, any strides but the last; allocated where not given.
        out_v: [tokens, heads, v_dim], likewise, of the same format.
        dtype: the FP8 format of outputs that are not given.
        pdl: start while the kernel in front ends (:mod:`fp8kv.kernels.pdl`).

    Returns:
        ``out_k`` and ``out_v``.

    Raises:
        KernelArgumentError: an argument's shape, dtype, device or stride does not fit.
    """
    _check(k_nope, k_rope, value, k_scale, v_scale, out_k, out_v)
    tokens, heads, nope = k_nope.shape
    rope, v_dim = k_rope.shape[2], value.shape[2]
    outputs = {"out_k": (out_k, (tokens, heads, nope + rope)), "out_v": (out_v, value.shape)}
    out_k, out_v = fp8_outputs(outputs, dtype, k_nope.device)
    if tokens * heads == 0:
        return out_k, out_v
    nope_block, rope_block, value_block = (
        triton.next_power_of_2(width) for width in (nope, rope, v_dim)
    )
    block_rows = max(1, _BLOCK_ELEMENTS // max(nope_block, rope_block, value_block))
    overlaps = uses_pdl(pdl, k_nope.device)
    _kernel[(triton.cdiv(tokens * heads, block_rows),)](
        k_nope,
        k_rope,
        value,
        k_scale,
        v_scale,
        out_k.view(torch.uint8),
        out_v.view(torch.uint8),
        tokens * heads,
        heads,
        *k_nope.stride()[:2],
        k_rope.stride(0),
        k_rope.stride(1) if k_rope.shape[1] > 1 else 0,
        *value.stride()[:2],
        int(k_scale.numel() > 1),
        int(v_scale.numel() > 1),
        *out_k.stride()[:2],
        *out_v.stride()[:2],
        NOPE=nope,
        ROPE=rope,
        VALUE=v_dim,
        NOPE_BLOCK=nope_block,
        ROPE_BLOCK=rope_block,
        VALUE_BLOCK=value_block,
        ROWS=block_rows,
        PDL=overlaps,
        num_warps=4,
        CAST=plan_cast(out_k.dtype, out_k.device),
        **launch_options(overlaps),
    )
    return out_k, out_v


def _check(
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    out_k: Tensor | None,
    out_v: Tensor | None,
) -> None:
    require_shape("k_nope", k_nope, (None, None, None))
    tokens, heads, _ = k_nope.shape
    shared = k_rope.dim() == 3 and k_rope.shape[1] == 1
    require_shape("k_rope", k_rope, (tokens, 1 if shared else heads, None))
    require_shape("value", value, (tokens, heads, None))
    require(tokens * heads < 1 << 31, "tokens times heads", tokens * heads, "below 2^31")
    require_dtype("k_nope", k_nope, FLOAT_TYPES)
    require_dtype("k_rope", k_rope, (k_nope.dtype,))
    require_dtype("value", value, (k_nope.dtype,))
    require_scale("k_scale", k_scale, heads)
    require_scale("v_scale", v_scale, heads)
    inputs = {"k_nope": k_nope, "k_rope": k_rope, "value": value}
    require_same_device(**inputs, k_scale=k_scale, v_scale=v_scale, out_k=out_k, out_v=out_v)
    for name, tensor in inputs.items():
        require_unit_stride(name, tensor)
