"""FP8 formats and the scale convention, in plain torch.

Convention: ``x ~= float(code) * scale``. A scale is positive, finite and float32. The stored code is
``x / scale`` in float32, clamped to the format's range, then cast once, round to nearest even.
NaN stays NaN. Infinities saturate, as they do in the serving engines' store kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fp8Format:
    """Limits of one FP8 format, all taken from ``torch.finfo``.

    Attributes:
        name: ``e4m3fn``, ``e5m2`` or ``e4m3fnuz``.
        dtype: the torch dtype.
        max: largest finite magnitude.
        smallest_normal: smallest normal magnitude; below it the steps are equally wide.
        smallest_subnormal: the step in the subnormal range, and the smallest magnitude above zero.
        mantissa_bits: explicit bits of the significand.
    """

    name: str
    dtype: torch.dtype
    max: float
    smallest_normal: float
    smallest_subnormal: float
    mantissa_bits: int


def _describe(name: str, dtype: torch.dtype) -> Fp8Format:
    info = torch.finfo(dtype)
    mantissa_bits = round(-torch.log2(torch.tensor(info.eps)).item())
    return Fp8Format(
        name=name,
        dtype=dtype,
        max=info.max,
        smallest_normal=info.smallest_normal,
        smallest_subnormal=info.smallest_normal * 2.0**-mantissa_bits,
        mantissa_bits=mantissa_bits,
    )


FORMATS: dict[str, Fp8Format] = {
    "e4m3fn": _describe("e4m3fn", torch.float8_e4m3fn),
    "e5m2": _describe("e5m2", torch.float8_e5m2),
    "e4m3fnuz": _describe("e4m3fnuz", torch.float8_e4m3fnuz),
}


_BY_DTYPE = {fmt.dtype: fmt for fmt in FORMATS.values()}


def get_format(name: str) -> Fp8Format:
    """Return the format called ``name``.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise ValueError(
            f"unknown FP8 format {name!r}; known formats: {', '.join(FORMATS)}"
        ) from None


def format_of(dtype: torch.dtype) -> Fp8Format:
    """Return the format whose codes have this dtype.

    Raises:
        KeyError: ``dtype`` is no FP8 format of :data:`FORMATS`.
    """
    return _BY_DTYPE[dtype]


def quantize(x: Tensor, scale: Tensor | float, fmt: Fp8Format) -> Tensor:
    """Return the FP8 codes of ``x``.

    Args:
        x: any shape, any floating dtype.
        scale: float32, broadcastable to ``x``; e.g. ``[heads, 1, 1]`` for ``x`` of ``[heads, tokens, head_dim]``.
        fmt: the FP8 format.

    Returns:
        A tensor like ``x`` of dtype ``fmt.dtype``.
    """
    # A plain number would be turned into a reciprocal on a GPU; a tensor on the device is divided by.
    divisor = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    # Clamp first: what a cast does above the largest value differs between torch versions and devices.
    return (x.float() / divisor).clamp(-fmt.max, fmt.max).to(fmt.dtype)


def dequantize(codes: Tensor, scale: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``float(codes) * scale``, rounded once to ``dtype``."""
    return (codes.float() * scale).to(dtype)


def quantize_dequantize(x: Tensor, scale: Tensor | float, fmt: Fp8Format) -> Tensor:
    """Return what a reader of the FP8 cache sees in place of ``x``, in the dtype of ``x``."""
    return dequantize(quantize(x, scale, fmt), scale, x.dtype)


def sqnr_db(x: Tensor, y: Tensor) -> float:
    """Return the signal-to-quantisation-noise ratio of ``y`` against ``x``, in decibels; ``inf`` where equal."""
    signal = x.double().square().sum()
    noise = (x.double() - y.double()).square().sum()
    return float("inf") if noise == 0 else (10 * torch.log10(signal / noise)).item()


def round_up_to_bfloat16(scale: Tensor) -> Tensor:
    """Return the smallest bfloat16-representable float32 values that are not below ``scale``.

    Some engines hold a scale in bfloat16. A scale rounded here is read the same by all of them, and rounding up
    never makes a value clip.

    Args:
        scale: float32, positive and finite, any shape.
    """
    bits = scale.to(torch.float32).contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
