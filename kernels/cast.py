"""Device functions that the kernels share: an exact division by a scale, FP8 codes from float32, and FP16 from codes.

The contract of every kernel that writes codes: ``code = round(clamp(x / scale))``, the division rounded as IEEE 754
asks, the cast to nearest even, NaN kept. It is met in two ways that give the same bits:

- *native*: the GPU's own conversion, where it has one for the format that rounds once;
- *integer*: the code is put together from the bits of the float32. It serves GPUs and formats without a conversion
  (the ``fnuz`` format on NVIDIA; any before compute capability 9.0: at 8.9 the compiler rounds to FP16 on the way), and
  Triton's interpreter, whose FP8 cast is wrong.

FP8 codes are FP16 numbers. Where the GPU does not widen them itself, FP16 numbers are made of a code's bits; they are
smaller than the code's value by a power of two, :data:`BIT_UNITS`, which the kernels put where they put the scale.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from fp8kv.kernels.fp8 import format_of

# FP16 has 15 as its exponent's bias; E4M3 has 7, its fnuz variant 8, E5M2 15 like FP16.
BIT_UNITS = {torch.float8_e4m3fn: 256.0, torch.float8_e5m2: 1.0, torch.float8_e4m3fnuz: 128.0}


@dataclass(frozen=True)
class CastPlan:
    """The compile-time facts that the device functions below need, for one format on one device.

    Attributes:
        native: whether the GPU's conversion instruction is used.
        exact_fma: whether ``tl.fma`` rounds once; it does on GPUs, and does not in Triton's interpreter.
        max_bits: the bits, as float32, of the largest finite magnitude.
        mantissa_bits: explicit bits of the significand.
        min_exponent: exponent of the smallest normal number.
        nan_code: the code for NaN.
        e5m2: whether the native conversion goes to E5M2 rather than to E4M3.
        signed_zero: whether -0.0 has a code of its own; in ``fnuz`` formats that code is NaN.
    """

    native: bool
    exact_fma: bool
    max_bits: int
    mantissa_bits: int
    min_exponent: int
    nan_code: int
    e5m2: bool
    signed_zero: bool

    def constants(self) -> dict[str, int | bool]:
        """Return the keyword arguments that a kernel passes on to :func:`encode` and :func:`divide`."""
        return {
            "NATIVE": self.native,
            "EXACT_FMA": self.exact_fma,
            "MAX_BITS": self.max_bits,
            "MANTISSA_BITS": self.mantissa_bits,
            "MIN_EXPONENT": self.min_exponent,
            "NAN_CODE": self.nan_code,
            "E5M2": self.e5m2,
            "SIGNED_ZERO": self.signed_zero,
        }


@functools.cache
def plan_cast(dtype: torch.dtype, device: torch.device) -> CastPlan:
    """Return how codes of ``dtype`` are made on ``device``.

    Raises:
        KeyError: ``dtype`` is no FP8 format of :data:`fp8kv.kernels.fp8.FORMATS`.
    """
    fmt = format_of(dtype)
    interpreted = bool(knobs.runtime.interpret)
    fnuz = fmt.name.endswith("fnuz")
    return CastPlan(
        native=not interpreted and not fnuz and _capability(device) >= (9, 0),
        exact_fma=not interpreted,
        max_bits=_float_bits(fmt.max),
        mantissa_bits=fmt.mantissa_bits,
        min_exponent=round(torch.log2(torch.tensor(fmt.smallest_normal)).item()),
        nan_code=0x80 if fnuz else 0x7F,
        e5m2=fmt.name == "e5m2",
        signed_zero=not fnuz,
    )


def plan_write(cache: Tensor) -> CastPlan | None:
    """Return how values become what ``cache`` holds: codes, or ``None`` where it is unquantised and takes them as they are."""
    return plan_cast(cache.dtype, cache.device) if cache.element_size() == 1 else None


def decodes_natively(dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether the GPU has an instruction that widens codes of ``dtype``; that is exact wherever it has."""
    interpreted = bool(knobs.runtime.interpret)
    return not interpreted and dtype != torch.float8_e4m3fnuz and _capability(device) >= (8, 9)


@triton.jit
def divide(x, scale, reciprocal, EXACT_FMA: tl.constexpr, SELECT: tl.constexpr = False):
    """Return ``x / scale`` in float32, rounded once, given ``reciprocal = 1 / scale`` rounded once.

    One multiplication and two fused multiply-adds in place of the eight or more instructions of an IEEE division: the
    excess ``q * scale - x`` is exact, and corrects the quotient (P. Markstein, "Computation of elementary functions
    on the IBM RISC System/6000 processor", 1990). Holds for scales from 2^-86 to 2^99 and quotients up to 2^20;
    those above come out larger than any format's maximum, with their sign. ``SELECT`` keeps them so by a select in place
    of a bound: the same results, and which of the two is faster depends on the kernel around it.
    """
    if EXACT_FMA and SELECT:
        quotient = x * reciprocal
        excess = tl.fma(quotient, scale, x * -1.0)
        corrected = tl.fma(excess, reciprocal * -1.0, quotient)
        result = tl.where(tl.abs(quotient) < 1048576.0, corrected, quotient)
    elif EXACT_FMA:
        # the bound keeps the excess finite; a NaN that it drops comes back with x in the excess
        quotient = tl.clamp(x * reciprocal, -1048576.0, 1048576.0)
        # a product with -1 is free and keeps the sign of zero; the unary minus is 0 - x here, and loses it
        excess = tl.fma(quotient, scale, x * -1.0)
        result = tl.fma(excess, reciprocal * -1.0, quotient)
    else:
        result = x / scale
    return result


@triton.jit
def encode(
    x,
    NATIVE: tl.constexpr,
    MAX_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    NAN_CODE: tl.constexpr,
    E5M2: tl.constexpr,
    SIGNED_ZERO: tl.constexpr,
):
    """Return the FP8 codes of float32 ``x`` as uint8: saturated, rounded to nearest even, NaN kept."""
    if NATIVE:
        if E5M2:
            codes = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
        else:
            codes = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        is_nan = magnitude > 0x7F800000
        magnitude = tl.minimum(magnitude, MAX_BITS)
        # Adding 1.5 * 2^(exponent + 23 - MANTISSA_BITS) leaves no bits of the sum for what lies below the format's
        # last place, so the addition itself rounds to nearest even; the subtraction gives the rounded value back.
        smallest_normal: tl.constexpr = (MIN_EXPONENT + 127) << 23
        exponent = tl.maximum(magnitude & 0x7F800000, smallest_normal)
        magic = (exponent + ((23 - MANTISSA_BITS) << 23)).to(tl.float32, bitcast=True) * 1.5
        rounded = (magnitude.to(tl.float32, bitcast=True) + magic) - magic
        rounded_bits = rounded.to(tl.int32, bitcast=True)
        normal = (rounded_bits >> (23 - MANTISSA_BITS)) - ((MIN_EXPONENT + 126) << MANTISSA_BITS)
        subnormal_step: tl.constexpr = (MANTISSA_BITS - MIN_EXPONENT + 127) << 23
        steps = tl.full(x.shape, subnormal_step, tl.int32).to(tl.float32, bitcast=True)
        subnormal = (rounded * steps).to(tl.int32)
        codes32 = tl.where(rounded_bits >= smallest_normal, normal, subnormal)
        sign = (bits >> 24) & 0x80
        if SIGNED_ZERO:
            codes32 = codes32 | sign
        else:
            codes32 = tl.where(codes32 > 0, codes32 | sign, codes32)
        codes = tl.where(is_nan, NAN_CODE, codes32).to(tl.uint8)
    return codes


@triton.jit
def decode(codes, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """Return the FP16 numbers of codes in uint8: of the GPU's conversion, or those of :func:`decode_bits`."""
    if NATIVE and FORMAT == "e5m2":
        return codes.to(tl.float8e5, bitcast=True).to(tl.float16)
    elif NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        return decode_bits(codes.to(tl.uint16), FORMAT)


@triton.jit
def decode_bits(codes, FORMAT: tl.constexpr):
    """Return FP16 numbers made of the bits of codes in uint16: exact, NaN kept, smaller by ``BIT_UNITS``."""
    if FORMAT == "e5m2":
        half = codes << 8
    else:
        half = ((codes & 0x80) << 8) | ((codes & 0x7F) << 7)
        is_nan = (codes & 0x7F) == 0x7F if FORMAT == "e4m3fn" else codes == 0x80
        half = tl.where(is_nan, 0x7E00, half)
    return half.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def power_of_two(exponent):
    """Return ``2 ** exponent`` as float32, for int32 exponents of -126 to 127, without rounding."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def next_exponent(scale):
    """Return the smallest int32 e with ``2 ** e >= scale``, for a positive, finite, normal float32."""
    return ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23) - 127


def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of an NVIDIA GPU, (0, 0) for anything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def _float_bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32).item())
