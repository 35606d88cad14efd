"""A histogram of magnitudes whose bins are cut from the float32 bit pattern.

Every octave (power of two) is divided into :data:`BINS_PER_OCTAVE` bins of equal width, as in a high dynamic
range histogram. A bin is the leading bits of the number, so counting is integer work: exact, the same on every
device, and independent of the order in which data arrives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS_PER_OCTAVE = 16
FIRST_EXPONENT = -32
LAST_EXPONENT = 24
"""The octaves kept apart: from far below the smallest FP8 subnormal at any sensible scale to far above the largest
value that a cache can hold. What lies outside is counted in the first and the last bin."""

NUM_BINS = (LAST_EXPONENT - FIRST_EXPONENT) * BINS_PER_OCTAVE + 2

_MANTISSA_SHIFT = 23 - 4  # keeps four mantissa bits of float32: sixteen bins an octave
_NUM_CODES = 1 << (31 - _MANTISSA_SHIFT)
_FIRST_CODE = (FIRST_EXPONENT + 127) * BINS_PER_OCTAVE
_LAST_CODE = (LAST_EXPONENT + 127) * BINS_PER_OCTAVE
_NONFINITE_CODE = 255 * BINS_PER_OCTAVE


@dataclass(frozen=True)
class MagnitudeCounts:
    """Counts of one set of values, per head.

    Attributes:
        histogram: ``[heads, NUM_BINS]`` int64, counts of non-zero finite magnitudes per bin of :func:`bin_edges`.
        zeros: ``[heads]`` int64, magnitudes below 2**-130, which no cache format tells from zero.
        nonfinite: ``[heads]`` int64, NaN and infinities.
    """

    histogram: Tensor
    zeros: Tensor
    nonfinite: Tensor


def bin_edges() -> Tensor:
    """Return the ``[NUM_BINS + 1]`` float64 edges: 0, the octaves' subdivisions, and the end of float32."""
    octaves = torch.arange(FIRST_EXPONENT, LAST_EXPONENT, dtype=torch.float64)
    steps = 1 + torch.arange(BINS_PER_OCTAVE, dtype=torch.float64) / BINS_PER_OCTAVE
    inner = (2.0 ** octaves[:, None] * steps[None, :]).flatten()
    ends = torch.tensor([2.0**LAST_EXPONENT, 2.0**128], dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), inner, ends])


def count_magnitudes(magnitudes: Tensor) -> MagnitudeCounts:
    """Count magnitudes per head.

    Args:
        magnitudes: ``[batch, heads, tokens, width]``, non-negative (or NaN), bfloat16, float16 or float32.
    """
    counts = _count_codes(_codes(magnitudes))
    return MagnitudeCounts(
        histogram=torch.cat(
            [
                counts[:, 1:_FIRST_CODE].sum(1, keepdim=True),
                counts[:, _FIRST_CODE:_LAST_CODE],
                counts[:, _LAST_CODE:_NONFINITE_CODE].sum(1, keepdim=True),
            ],
            dim=1,
        ),
        zeros=counts[:, 0],
        nonfinite=counts[:, _NONFINITE_CODE:].sum(1),
    )


def _count_codes(codes: Tensor) -> Tensor:
    """Return ``[heads, codes]`` int64 counts of int32 codes ``[batch, heads, tokens, width]``."""
    num_heads = codes.shape[1]
    if codes.is_cuda:
        # One head at a time its counts fit into shared memory, and unlike bincount nothing waits for the device:
        # 0.7 against 5.6 ms for 33.5 M values in 8 heads (NVIDIA H200, torch 2.11).
        per_head = [
            torch.histc(codes[:, head], bins=_NUM_CODES, min=0, max=_NUM_CODES)
            for head in range(num_heads)
        ]
        return torch.stack(per_head).to(torch.int64)
    heads = torch.arange(num_heads, dtype=codes.dtype)
    counts = torch.bincount(
        (codes + heads[:, None, None] * _NUM_CODES).flatten(), minlength=num_heads * _NUM_CODES
    )
    return counts.view(num_heads, _NUM_CODES)


def _codes(magnitudes: Tensor) -> Tensor:
    """Return the leading bits of each magnitude as a new int32 tensor."""
    if magnitudes.dtype == torch.bfloat16:
        # bfloat16 is the upper half of float32: its own bits do, without the wider copy
        return (magnitudes.contiguous().view(torch.int16) >> (_MANTISSA_SHIFT - 16)).to(torch.int32)
    return magnitudes.float().contiguous().view(torch.int32) >> _MANTISSA_SHIFT
