"""Outputs of a launcher: FP8 ones, checked or allocated, and those of the first stage of a split decode.

Needs torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fp8kv.kernels.arguments import (
    FP8_TYPES,
    require,
    require_dtype,
    require_shape,
    require_unit_stride,
)


def fp8_outputs(
    wanted: Mapping[str, tuple[Tensor | None, Sequence[int]]],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    """Return the outputs in order, all of one FP8 format: that of the first one given, else ``dtype``.

    Args:
        wanted: by its name in the launcher, each output as the caller gave it, or ``None``, and its shape.
        dtype: the format where no output is given.
        device: where new outputs go; that given ones lie there is the launcher's check.

    Raises:
        KernelArgumentError: a shape, format or last stride does not fit, or ``dtype`` is no FP8 format.
    """
    require(dtype in FP8_TYPES, "dtype", dtype, f"one of {FP8_TYPES}")
    allowed: Sequence[torch.dtype] = FP8_TYPES
    for name, (tensor, shape) in wanted.items():
        if tensor is not None:
            require_shape(name, tensor, shape)
            require_dtype(name, tensor, allowed)
            require_unit_stride(name, tensor)
            allowed = (tensor.dtype,)
    made = dtype if len(allowed) > 1 else allowed[0]
    return [
        torch.empty(shape, dtype=made, device=device) if tensor is None else tensor
        for tensor, shape in wanted.values()
    ]


def stage_one_outputs(out: Tensor, lse: Tensor | None, splits: int) -> tuple[Tensor, Tensor | None]:
    """Return where the first stage of a split decode writes.

    With one split that is ``out`` and ``lse`` themselves, the logarithms being natural ones. With several it is new
    float32 tensors for :mod:`fp8kv.kernels.combine`, whose logarithms are to base 2.

    Args:
        out: [batch, heads, dim].
        lse: [batch, heads] float32, or None where nobody asked for it.
        splits: parts of a sequence.

    Returns:
        [batch, heads, splits, dim], and [batch, heads, splits] or None.
    """
    if splits == 1:
        return out.unsqueeze(2), lse.unsqueeze(2) if lse is not None else None
    sizes = (*out.shape[:2], splits)
    partial_out = torch.empty(*sizes, out.shape[2], dtype=torch.float32, device=out.device)
    return partial_out, torch.empty(sizes, dtype=torch.float32, device=out.device)
