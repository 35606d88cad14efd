"""FP8 weights with one scale per block, the storage of DeepSeek-V3 and MiniMax-M2.

A weight ``[rows, cols]`` is cut into blocks of 128 x 128; the last block of a row or column may be ragged (576 rows
are 4.5 blocks). Scales are float32 ``[ceil(rows / 128), ceil(cols / 128)]`` and follow the convention of
:mod:`fp8kv.kernels.fp8`: ``weight ~= float(code) * scale``. On disk such a scale is called ``weight_scale_inv``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8kv.kernels.fp8 import get_format, quantize


def quantize_block(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Quantise ``weight`` to e4m3fn with one scale per block, absmax / 448.

    Args:
        weight: ``[rows, cols]``, any floating dtype, finite.
        block: rows and columns of a block.

    Returns:
        The codes ``[rows, cols]``, float8_e4m3fn, and the scales
        ``[ceil(rows / block), ceil(cols / block)]``, float32. A block of zeros has the scale 1.

    Raises:
        ValueError: ``weight`` is not a matrix.
    """
    fmt = get_format("e4m3fn")
    rows, cols = _matrix_shape(weight)
    padded = torch.nn.functional.pad(weight.float(), (0, -cols % block, 0, -rows % block))
    blocks = padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)
    absmax = blocks.abs().amax(dim=(1, 3))
    scales = torch.where(absmax > 0, absmax / fmt.max, torch.ones_like(absmax))
    codes = quantize(blocks, scales[:, None, :, None], fmt).view_as(padded)
    return codes[:rows, :cols].contiguous(), scales


def dequantize_block(
    codes: Tensor,
    scales: Tensor,
    block: int | tuple[int, int] = 128,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return ``float(codes) * scale``, rounded once to ``dtype``.

    Peak memory beside the arguments: the result, and 4 bytes for each of :func:`chunk_elements` elements, or of one
    row of blocks if that is more.

    Args:
        codes: ``[rows, cols]``, any FP8 dtype.
        scales: ``[ceil(rows / block), ceil(cols / block)]``, any floating dtype.
        block: the edge of a square block, or its (rows, columns).
        dtype: of the result.

    Returns:
        ``[rows, cols]`` of ``dtype``, on the device of ``codes``.

    Raises:
        ValueError: ``codes`` is not a matrix, or ``scales`` does not fit it.
    """
    rows, cols = _matrix_shape(codes)
    block_rows, block_cols = (block, block) if isinstance(block, int) else block
    expected = (-(-rows // block_rows), -(-cols // block_cols))
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"a weight of {rows} x {cols} in blocks of {block_rows} x {block_cols} needs scales of "
            f"{expected[0]} x {expected[1]}, not {list(scales.shape)}"
        )
    row_scales = scales.float().repeat_interleave(block_cols, dim=1)[:, :cols]
    result = torch.empty(rows, cols, dtype=dtype, device=codes.device)
    whole = rows // block_rows
    step = max(1, chunk_elements(codes.device) // max(1, block_rows * cols))
    for first in range(0, whole, step):
        last = min(first + step, whole)
        part = slice(first * block_rows, last * block_rows)
        blocks = codes[part].float().reshape(last - first, block_rows, cols)
        result[part] = blocks.mul_(row_scales[first:last, None]).flatten(0, 1)
    if whole < expected[0]:
        part = slice(whole * block_rows, rows)
        result[part] = codes[part].float().mul_(row_scales[whole])
    return result


def chunk_elements(device: torch.device) -> int:
    """Return how many elements of a weight to decode at once: a CPU's cache holds few, a GPU wants few launches."""
    return 2**20 if device.type == "cpu" else 2**24


def _matrix_shape(weight: Tensor) -> tuple[int, int]:
    if weight.ndim != 2:
        raise ValueError(f"a block-quantised weight is a matrix, not {list(weight.shape)}")
    return weight.shape[0], weight.shape[1]
