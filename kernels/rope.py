"""Rotary embedding without Triton: what it asks of its inputs, which columns it takes, how it rotates them.

A rotary pair (a, b) with the cosine c and the sine s of its angle becomes ``(a*c - b*s, b*c + a*s)``. The elements of a
pair are half of ``rope_dim`` apart ("half-split", as in Llama and most models), or neighbours ("interleaved", as in
DeepSeek-V3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fp8kv.kernels.arguments import (
    FLOAT_TYPES,
    INDEX_TYPES,
    require,
    require_dtype,
    require_shape,
    require_unit_stride,
)


class RopeStream(NamedTuple):
    """Q or K as a kernel sees it: the columns that are rotated apart from the others, strides in elements.

    Attributes:
        nope: [tokens, heads, nope_dim], the columns that are not rotated.
        rope: [tokens, heads or 1, rope_dim], those that are.
        out_nope: where the codes of the first go, as uint8.
        out_rope: where the codes of the second go, as uint8.
        scale: one element, or one per head.
        heads: how many heads.
        nope_token: stride of ``nope`` between tokens; the other strides likewise.
        nope_head: between heads.
        rope_token: of ``rope``.
        rope_head: of ``rope``; 0 where all heads share one.
        out_token: of both outputs.
        out_head: of both outputs.
        scale_head: 1, or ``None`` where one scale serves all heads.
    """

    nope: Tensor
    rope: Tensor
    out_nope: Tensor
    out_rope: Tensor
    scale: Tensor
    heads: int
    nope_token: int
    nope_head: int
    rope_token: int
    rope_head: int
    out_token: int
    out_head: int
    scale_head: int | None


def rope_stream(
    nope: Tensor, rope: Tensor, out_nope: Tensor, out_rope: Tensor, scale: Tensor
) -> RopeStream:
    """Return Q or K with its strides; the tensors are described at :class:`RopeStream`."""
    return RopeStream(
        nope=nope,
        rope=rope,
        out_nope=out_nope.view(torch.uint8),
        out_rope=out_rope.view(torch.uint8),
        scale=scale,
        heads=nope.shape[1],
        nope_token=nope.stride(0),
        nope_head=nope.stride(1),
        rope_token=rope.stride(0),
        rope_head=rope.stride(1) if rope.shape[1] == nope.shape[1] else 0,
        out_token=out_rope.stride(0),
        out_head=out_rope.stride(1),
        scale_head=1 if scale.numel() > 1 else None,
    )


def check_rope(
    query: Tensor,
    key: Tensor,
    key_rope: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    rope_dim: int,
) -> None:
    """Check the inputs of a rotary embedding, as :func:`fp8kv.kernels.rope_quantize.rope_quantize` describes them.

    Raises:
        KernelArgumentError: a shape, dtype or last stride does not fit.
    """
    require_shape("query", query, (None, None, None))
    tokens, _, dim = query.shape
    require(0 < rope_dim <= dim, "rope_dim", rope_dim, f"from 2 to {dim}, the width of query")
    require(rope_dim % 2 == 0, "rope_dim", rope_dim, "even")
    require_shape("key", key, (tokens, None, dim if key_rope is None else dim - rope_dim))
    if key_rope is not None:
        shared = key_rope.dim() == 3 and key_rope.shape[1] == 1
        require_shape("key_rope", key_rope, (tokens, 1 if shared else key.shape[1], rope_dim))
        require_dtype("key_rope", key_rope, (query.dtype,))
        require_unit_stride("key_rope", key_rope)
    require_shape("positions", positions, (tokens,))
    require_shape("cos_sin", cos_sin, (None, rope_dim))
    require_dtype("query", query, FLOAT_TYPES)
    require_dtype("key", key, (query.dtype,))
    require_dtype("positions", positions, INDEX_TYPES)
    require_dtype("cos_sin", cos_sin, (torch.float32,))
    inputs = {"query": query, "key": key, "positions": positions, "cos_sin": cos_sin}
    for name, tensor in inputs.items():
        require_unit_stride(name, tensor)


def split_columns(heads: Tensor, rope_dim: int, rope_last: bool) -> tuple[Tensor, Tensor]:
    """Return views of the columns that are not rotated, and of those that are.

    Args:
        heads: [..., dim].
        rope_dim: how many columns are rotated.
        rope_last: they are the last ones, rather than the first.
    """
    nope_dim = heads.shape[-1] - rope_dim
    if rope_last:
        return heads[..., :nope_dim], heads[..., nope_dim:]
    return heads[..., rope_dim:], heads[..., :rope_dim]


def rotate(part: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    """Return ``part`` rotated, in float32, every product and sum rounded on its own.

    Args:
        part: [tokens, heads, rope_dim].
        positions: [tokens], rows of ``cos_sin``.
        cos_sin: [max_positions, rope_dim] float32, the cosines of all pairs, then their sines.
        interleaved: the elements of a pair are neighbours.
    """
    cos, sin = cos_sin[positions.long(), None].chunk(2, dim=-1)
    pairs = part.float()
    a, b = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, dim=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    return torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
