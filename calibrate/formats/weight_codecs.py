"""Decode one quantised weight: FP8 with any layout of scales, and compressed-tensors' packed INT4.

Pure functions, which run where their tensors are. They raise :class:`ValueError` where tensors and scheme do not fit;
the caller knows the name. Beside arguments and result they need little: a weight is decoded a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8kv.calibrate.formats.fp8_block import chunk_elements, dequantize_block

_NIBBLES_PER_WORD = 8
_INT4_ZERO = 8  # a nibble holds value + 8


@dataclass(frozen=True)
class WeightScheme:
    """What a quantisation config says about the weights.

    Attributes:
        block: rows and columns of an FP8 block, or None.
        group_sizes: columns of an INT4 group in each group of modules; empty if the config names none.
        int4_refusal: why packed weights cannot be decoded as symmetric INT4; empty if they can.
    """

    block: tuple[int, int] | None
    group_sizes: tuple[int, ...]
    int4_refusal: str


def read_scheme(quantization: Mapping[str, Any]) -> WeightScheme:
    """Read block size and group sizes from a quantisation config; {} gives a scheme that states nothing."""
    block = _block(quantization.get("weight_block_size"))
    group_sizes: list[int] = []
    refusal = ""
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        block = block or _block(weights.get("block_structure"))
        if weights.get("type") != "int":
            continue
        if type(weights.get("group_size")) is int and weights["group_size"] > 0:
            group_sizes.append(weights["group_size"])
        if weights.get("num_bits") != 4:
            refusal = f"it has {weights.get('num_bits')} bits a weight by its config, not 4"
        elif weights.get("symmetric") is False:
            refusal = "it is asymmetric by its config"
    return WeightScheme(block, tuple(group_sizes), refusal)


def decode_fp8(codes: Tensor, scales: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> Tensor:
    """Return ``float(codes) * scale``, rounded once to ``dtype``.

    Args:
        codes: ``[..., rows, cols]``, FP8.
        scales: one element; one per block of ``scheme.block``; or broadcastable: one per row, per leading index.
        scheme: of the checkpoint.
        dtype: of the result.

    Raises:
        ValueError: the scales fit the weight in none of these ways.
    """
    scales = scales.float()
    if scales.numel() == 1:
        return _multiply(codes, scales.reshape(()), dtype)
    if scheme.block is not None and _is_blocked(codes, scales, scheme.block):
        matrices = codes.reshape(-1, *codes.shape[-2:])
        grids = scales.reshape(-1, *scales.shape[-2:])
        if len(matrices) == 1:
            return dequantize_block(matrices[0], grids[0], scheme.block, dtype).view(codes.shape)
        result = torch.empty(matrices.shape, dtype=dtype, device=codes.device)
        for decoded, matrix, grid in zip(result, matrices, grids, strict=True):
            decoded.copy_(dequantize_block(matrix, grid, scheme.block, dtype))
        return result.view(codes.shape)
    if scales.ndim == codes.ndim - 1 and scales.shape == codes.shape[:-1]:
        scales = scales.unsqueeze(-1)
    if scales.ndim == codes.ndim and all(
        size in (1, full) for size, full in zip(scales.shape, codes.shape, strict=True)
    ):
        return _multiply(codes, scales, dtype)
    blocks = f"in blocks of {list(scheme.block)}" if scheme.block else "without block size"
    raise ValueError(
        f"scales of {list(scales.shape)} do not fit FP8 codes of {list(codes.shape)} {blocks}"
    )


def decode_int4(
    packed: Tensor, scales: Tensor, shape: Tensor, scheme: WeightScheme, dtype: torch.dtype
) -> Tensor:
    """Return ``(nibble - 8) * scale``, rounded once to ``dtype``.

    Nibble j of word w holds column ``8 * w + j``, counted from the least significant bit.

    Args:
        packed: ``[rows, ceil(cols / 8)]``, int32.
        scales: ``[rows, ceil(cols / group)]``, floating; one column for one scale per row.
        shape: ``[2]``, integers: rows and cols; best on the CPU, for it is read here.
        scheme: of the checkpoint; its group sizes must include the one that the shapes imply.
        dtype: of the result.

    Returns:
        ``[rows, cols]``.

    Raises:
        ValueError: the scheme is not symmetric INT4, or the tensors do not fit together.
    """
    if scheme.int4_refusal:
        raise ValueError(f"only symmetric INT4 is supported and {scheme.int4_refusal}")
    if packed.ndim != 2 or shape.numel() != 2:
        raise ValueError(
            f"packed INT4 is a matrix with a shape of two numbers, not {list(packed.shape)} with "
            f"{shape.numel()}"
        )
    rows, cols = (int(size) for size in shape.flatten().tolist())
    if tuple(packed.shape) != (rows, math.ceil(cols / _NIBBLES_PER_WORD)):
        raise ValueError(f"{list(packed.shape)} words of INT4 do not hold {rows} x {cols} weights")
    group = _group_size(rows, cols, scales, scheme)
    result = torch.empty(rows, cols, dtype=dtype, device=packed.device)
    for part in _row_chunks(result):
        # The words as bytes, low byte first; each byte holds an even column in its low half and an odd one above it.
        bytes_ = packed[part].contiguous().view(torch.uint8)
        nibbles = torch.stack((bytes_ & 0xF, bytes_ >> 4), dim=-1).flatten(1)[:, :cols]
        values = nibbles.float().sub_(_INT4_ZERO)
        result[part] = values.mul_(scales[part].float().repeat_interleave(group, dim=1)[:, :cols])
    return result


def _multiply(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``float(codes) * scales``, where scales are broadcast, rounded once to ``dtype``."""
    if codes.ndim == 0:
        return (codes.float() * scales).to(dtype)
    result = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    scales = scales.expand(codes.shape)
    for part in _row_chunks(codes):
        result[part] = codes[part].float().mul_(scales[part])
    return result


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    step = max(1, chunk_elements(weight.device) * len(weight) // max(1, weight.numel()))
    for start in range(0, len(weight), step):
        yield slice(start, start + step)


def _block(value: Any) -> tuple[int, int] | None:
    if isinstance(value, str):
        value = [int(size) if size.isdigit() else 0 for size in value.split("x")]
    if (
        isinstance(value, list)
        and len(value) == 2
        and all(type(size) is int and size > 0 for size in value)
    ):
        return value[0], value[1]
    return None


def _is_blocked(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> bool:
    if codes.ndim < 2 or scales.ndim != codes.ndim:
        return False
    grid = (math.ceil(codes.shape[-2] / block[0]), math.ceil(codes.shape[-1] / block[1]))
    return scales.shape[:-2] == codes.shape[:-2] and tuple(scales.shape[-2:]) == grid


def _group_size(rows: int, cols: int, scales: Tensor, scheme: WeightScheme) -> int:
    if scales.ndim != 2 or scales.shape[0] != rows or scales.shape[1] < 1:
        raise ValueError(f"scales of {list(scales.shape)} do not fit {rows} x {cols} weights")
    if scales.shape[1] == 1:
        return cols
    for group in scheme.group_sizes:
        if math.ceil(cols / group) == scales.shape[1]:
            return group
    raise ValueError(
        f"{scales.shape[1]} scales a row of {cols} weights fit none of the config's group sizes "
        f"{list(scheme.group_sizes)}"
    )
