"""BF16, FP16 or FP32 to FP8 codes, with one scale or one per head.

Contract: ``code = clamp(x / scale)`` cast once to nearest even, the division in float32 and correctly rounded; NaN
stays NaN, infinities saturate (:mod:`fp8kv.kernels.fp8`). The codes equal :func:`reference_quantize`'s bit for bit.
Any width, also one that is no power of two; the input may be a strided view, such as one of several parts of a
projection's output, and so may ``out``. The scale lies on the device and is read at every launch, so a captured CUDA
graph follows it.

Floor: bytes read and written, 3 per element of a 16-bit input. The kernel is bound by memory: 16 elements per thread
are two 16-byte loads and one 16-byte store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fp8kv.kernels import fp8
from fp8kv.kernels.arguments import (
    FLOAT_TYPES,
    require,
    require_dtype,
    require_same_device,
    require_scale,
    require_unit_stride,
)
from fp8kv.kernels.cast import divide, encode, plan_cast
from fp8kv.kernels.outputs import fp8_outputs
from fp8kv.kernels.pdl import launch_options, uses_pdl
from fp8kv.kernels.rows import fold_rows

_BLOCK_ELEMENTS = 2048


def reference_quantize(
    x: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Do what :func:`quantize` does, in plain torch."""
    fmt = fp8.format_of(dtype if out is None else out.dtype)
    codes = fp8.quantize(x, scale if scale.numel() == 1 else scale[:, None], fmt)
    return codes if out is None else out.copy_(codes)


@triton.jit
def invert(scale):
    """Return the scale, 1 / scale rounded once, and 1 / scale as a sum of two numbers: what :func:`to_codes` needs.

    The sum is good to 2^-45. Its first number is 1 / scale rounded down, so that the second is positive.
    """
    nearest = tl.div_rn(1.0, scale)
    down = (nearest.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    high = tl.where(tl.fma(nearest, scale, -1.0) > 0.0, down, nearest)
    low = tl.fma(high, 0.0 - scale, 1.0) * nearest
    # At least 2^-60 of the first: too small to matter where 1 / scale is exact, but infinity times zero would be NaN.
    return scale, nearest, high, tl.maximum(low, high * 8.67361738e-19)


@triton.jit
def to_codes(x, inverse, CAST: tl.constexpr):
    """Return the codes of ``x / scale`` as uint8, given ``inverse = invert(scale)``.

    ``CAST`` is a :class:`fp8kv.kernels.cast.CastPlan`. A 16-bit input is divided in two operations, in place of the
    four of :func:`fp8kv.kernels.cast.divide`. The quotient may then differ from the correctly rounded one in the last
    place, but never across a boundary between two codes: no quotient of a number of 11 bits and one of 24 lies within
    2^-41 of a float32 rounding boundary beside a number of 5 bits, save one at 2^-48, whose sum errs to the right
    side. The tests check all of them. Holds for scales from 2^-60 to 2^60.
    """
    scale, nearest, high, low = inverse
    if CAST.exact_fma and x.dtype.primitive_bitwidth == 16:
        values = x.to(tl.float32)
        quotient = tl.fma(values, high, values * low)
    else:
        quotient = divide(x.to(tl.float32), scale, nearest, CAST.exact_fma, True)
    return encode(
        quotient,
        CAST.native,
        CAST.max_bits,
        CAST.mantissa_bits,
        CAST.min_exponent,
        CAST.nan_code,
        CAST.e5m2,
        CAST.signed_zero,
    )


@triton.jit(do_not_specialize=["elements"])
def _flat_kernel(
    x,
    scale,
    out,
    elements,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    CAST: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * BLOCK
    source = x + start
    target = out + start
    left = elements - start
    offsets = tl.arange(0, BLOCK)
    # A mask that ends on a multiple of 16 elements leaves every thread's accesses whole, whatever the width.
    whole = elements // 16 * 16 - start
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # Loads are issued in program order: the long one first, so that nothing waits for the scale before it.
    values = tl.load(source + offsets, mask=offsets < whole)
    inverse = invert(tl.load(scale))
    codes = to_codes(values, inverse, CAST)
    tl.store(target + offsets, codes, mask=offsets < whole)
    if (left <= BLOCK) & (whole < left):
        rest = whole + tl.arange(0, 16)
        rest_values = tl.load(source + rest, mask=rest < left)
        rest_codes = to_codes(rest_values, inverse, CAST)
        tl.store(target + rest, rest_codes, mask=rest < left)


@triton.jit(do_not_specialize=["rows"])
def _rows_kernel(
    x,
    scale,
    out,
    rows,
    inner,
    width,
    stride_x_outer,
    stride_out_outer,
    stride_x_inner,
    stride_out_inner,
    PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
    CAST: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    outer = row // inner
    head = (row - outer * inner).to(tl.int64)
    outer = outer.to(tl.int64)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    source = x + (outer * stride_x_outer + head * stride_x_inner)[:, None] + column[None, :]
    target = out + (outer * stride_out_outer + head * stride_out_inner)[:, None] + column[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    values = tl.load(source, mask=inside)
    if PER_HEAD:
        inverse = invert(tl.load(scale + head)[:, None])
    else:
        inverse = invert(tl.load(scale))
    codes = to_codes(values, inverse, CAST)
    tl.store(target, codes, mask=inside)


def quantize(
    x: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Return the FP8 codes of ``x / scale``.

    Args:
        x: [..., heads, dim] or [..., dim], bfloat16, float16 or float32. A view is taken as it is where its last stride
            is 1 and its dimensions fold into [tokens, heads, dim].
        scale: float32 on the device of ``x``: one element, or ``heads`` elements for one scale per head.
        dtype: the FP8 format, unless ``out`` says it.
        out: FP8, the shape of ``x``, strided like it or in another way that folds; allocated where not given.
        pdl: start while the kernel in front ends (:mod:`fp8kv.kernels.pdl`).

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        KernelArgumentError: an argument's shape, dtype, device or stride does not fit.
    """
    _check(x, scale, out)
    (out,) = fp8_outputs({"out": (out, x.shape)}, dtype, x.device)
    if x.numel() == 0:
        return out
    per_head = scale.numel() > 1
    rows = fold_rows(x, out, keep_heads=per_head)
    overlaps = uses_pdl(pdl, x.device)
    plan = plan_cast(out.dtype, x.device)
    codes = out.view(torch.uint8)
    if rows.contiguous:
        block, num_warps = _flat_block(rows.width)
        _flat_kernel[(triton.cdiv(rows.width, block),)](
            x,
            scale,
            codes,
            rows.width,
            BLOCK=block,
            num_warps=num_warps,
            PDL=overlaps,
            CAST=plan,
            **launch_options(overlaps),
        )
        return out
    columns = _column_block(rows.width)
    block_rows = max(1, _BLOCK_ELEMENTS // columns)
    grid = (
        triton.cdiv(rows.outer * rows.inner, block_rows),
        triton.cdiv(rows.width, columns),
    )
    _rows_kernel[grid](
        x,
        scale,
        codes,
        rows.outer * rows.inner,
        *rows[1:],
        PER_HEAD=per_head,
        ROWS=block_rows,
        COLUMNS=columns,
        num_warps=4,
        PDL=overlaps,
        CAST=plan,
        **launch_options(overlaps),
    )
    return out


def _check(x: Tensor, scale: Tensor, out: Tensor | None) -> None:
    require(x.dim() > 0, "the number of dimensions of x", 0, "at least 1")
    require_dtype("x", x, FLOAT_TYPES)
    require_unit_stride("x", x)
    require_scale("scale", scale, x.shape[-2] if x.dim() > 1 else None)
    require_same_device(x=x, scale=scale, out=out)


def _flat_block(elements: int) -> tuple[int, int]:
    """Return elements and warps of a program, for contiguous input."""
    # Small inputs are bound by latency: more and smaller programs spread them over the GPU.
    return (512, 2) if elements < 1 << 18 else (_BLOCK_ELEMENTS, 4)


def _column_block(width: int) -> int:
    """Return the widest power of two from 16 to 1024 that wastes few lanes on ``width`` columns."""
    blocks = (1024, 512, 256, 128, 64, 32, 16)
    padded = {block: triton.cdiv(width, block) * block for block in blocks}
    least = min(padded.values())
    return next(block for block in blocks if padded[block] * 8 <= least * 9)
