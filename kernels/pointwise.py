"""What lies between the matrix products of a decoder layer, each in one kernel: the RMS norm and the gated activation.

Transformers computes them operation by operation, with a pass over memory and a launch for each. The numbers here are
the same up to the order of the norm's sum: results are rounded to the input's type where transformers rounds them.

Floor: memory; at the few rows of a decode step, one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8kv.kernels.arguments import (
    FLOAT_TYPES,
    require,
    require_dtype,
    require_same_device,
    require_shape,
    require_unit_stride,
)

# elements of a program's tile, where rows are shorter
_TILE = 1024
_MAX_DIM = 16384


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: bool = False) -> Tensor:
    """Do what :func:`rms_norm` does, in plain torch."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)


def reference_silu_mul(gate_up: Tensor) -> Tensor:
    """Do what :func:`silu_mul` does, in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x,
    weight,
    out,
    rows,
    heads,
    stride_token,
    stride_head,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row = column < DIM
    exists = (row < rows)[:, None] & in_row[None, :]
    factor = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    start = row // heads * stride_token + row % heads * stride_head
    values = tl.load(x + start[:, None] + column[None, :], mask=exists, other=0.0).to(tl.float32)
    normed = values * tl.math.rsqrt(tl.sum(values * values, 1) / DIM + eps)[:, None]
    if OFFSET:
        result = normed * (1.0 + factor)
    else:
        result = normed.to(out.dtype.element_ty).to(tl.float32) * factor
    place = out + row[:, None] * DIM + column[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _silu_mul_kernel(gate_up, out, stride_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = column < WIDTH
    gate = tl.load(gate_up + row * stride_row + column, mask=in_row, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride_row + WIDTH + column, mask=in_row, other=0.0)
    active = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    result = (active * up.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + row * WIDTH + column, result, mask=in_row)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: bool = False) -> Tensor:
    """Divide rows by their root mean square and multiply them by a weight.

    Args:
        x: [tokens, heads, dim] bfloat16, float16 or float32; any strides but the last. The mean is over ``dim``, up to
            16384.
        weight: [dim], of the dtype of ``x``.
        eps: what is added to the mean square.
        offset: multiply by ``1 + weight``, before the only rounding (Gemma); otherwise rows are rounded, multiplied and
            rounded again (Llama).

    Returns:
        [tokens, heads, dim], contiguous, of the dtype of ``x``.

    Raises:
        KernelArgumentError: an argument's shape, dtype, device or stride does not fit.
    """
    require_same_device(x=x, weight=weight)
    require_dtype("x", x, FLOAT_TYPES)
    require_shape("x", x, (None, None, None))
    tokens, heads, dim = x.shape
    require(dim <= _MAX_DIM, "the width of x", dim, f"at most {_MAX_DIM}")
    require_unit_stride("x", x)
    require_dtype("weight", weight, (x.dtype,))
    require_shape("weight", weight, (dim,))
    require_unit_stride("weight", weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block = triton.next_power_of_2(dim)
    rows = max(1, _TILE // block)
    _rms_norm_kernel[(triton.cdiv(tokens * heads, rows),)](
        x,
        weight,
        out,
        tokens * heads,
        heads,
        x.stride(0),
        x.stride(1),
        eps,
        DIM=dim,
        BLOCK=block,
        ROWS=rows,
        OFFSET=offset,
        num_warps=min(max(block * rows // 512, 1), 16),
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """Multiply the second half of each row by the SiLU of the first.

    Args:
        gate_up: [rows, 2 * width] bfloat16, float16 or float32; any stride between rows.

    Returns:
        [rows, width], contiguous, of the same dtype.

    Raises:
        KernelArgumentError: the argument's shape, dtype or stride does not fit.
    """
    require_dtype("gate_up", gate_up, FLOAT_TYPES)
    require_shape("gate_up", gate_up, (None, None))
    require(gate_up.shape[1] % 2 == 0, "the width of gate_up", gate_up.shape[1], "even")
    require_unit_stride("gate_up", gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if out.numel() == 0:
        return out
    block = min(triton.next_power_of_2(width), _TILE)
    _silu_mul_kernel[(rows, triton.cdiv(width, block))](
        gate_up,
        out,
        gate_up.stride(0),
        WIDTH=width,
        BLOCK=block,
        num_warps=4,
    )
    return out
