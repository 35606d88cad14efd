"""Rotary embedding and quantisation of Q and K, in one launch.

Contract: the rotary part of each head is rotated by its token's position *in float32*, from the inputs as they are;
the result is never rounded to BF16 on its way to the code, which is that of :mod:`fp8kv.kernels.quantize`. The other
columns are quantised as they are. The formula and the two arrangements of pairs are those of
:mod:`fp8kv.kernels.rope`, every product and sum rounded on its own: the kernel is compiled without contraction to
fused multiply-adds (``enable_fp_fusion=False``), and eager torch knows none, so that codes agree with
:func:`reference_rope_quantize` bit for bit by construction.

For multi-head latent attention K may come in two pieces, the second shared by all heads and rotated for each of them
again: that costs no traffic, its 128 bytes stay in the cache of the multiprocessor.

Floor: bytes read and written. A program takes a tile of tokens and heads, so that few heads and many are equally
fast; the cosines of a token are read by each of its heads, from the first-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fp8kv.kernels.arguments import require_same_device, require_scale
from fp8kv.kernels.cast import plan_cast
from fp8kv.kernels.outputs import fp8_outputs
from fp8kv.kernels.pdl import launch_options, uses_pdl
from fp8kv.kernels.quantize import invert, reference_quantize, to_codes
from fp8kv.kernels.rope import check_rope, rope_stream, rotate, split_columns

_ROWS = 16  # tokens times heads of a tile


@dataclass(frozen=True)
class _Tile:
    """What is known of a program's tile when the kernel is compiled; the blocks are powers of two."""

    interleaved: bool
    nope: int
    half: int
    nope_block: int
    half_block: int
    tokens: int
    q_heads: int
    kv_heads: int
    q_blocks: int
    kv_blocks: int


def reference_rope_quantize(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    *,
    rope_dim: int | None = None,
    rope_last: bool = False,
    interleaved: bool = False,
    key_rope: Tensor | None = None,
    out_q: Tensor | None = None,
    out_k: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`rope_quantize` does, in plain torch."""
    width = cos_sin.shape[1] if rope_dim is None else rope_dim

    def whole(nope: Tensor, rope: Tensor) -> Tensor:
        rotated = rotate(rope, positions, cos_sin, interleaved).expand(*nope.shape[:2], -1)
        parts = (nope.float(), rotated) if rope_last else (rotated, nope.float())
        return torch.cat(parts, dim=-1)

    query_parts = split_columns(query, width, rope_last)
    key_parts = (key, key_rope) if key_rope is not None else split_columns(key, width, rope_last)
    return (
        reference_quantize(whole(*query_parts), q_scale, dtype=dtype, out=out_q),
        reference_quantize(whole(*key_parts), k_scale, dtype=dtype, out=out_k),
    )


@triton.jit
def _rotate_and_store(
    stream,
    first_head,
    token,
    exists,
    cosines,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    CAST: tl.constexpr,
) -> None:
    """Rotate and quantise a tile of Q or of K, [tokens, heads, columns]."""
    head = (first_head + tl.arange(0, HEADS))[None, :, None]
    exists = exists & (head < stream.heads)
    half = tl.arange(0, TILE.half_block)[None, None, :]
    both = tl.arange(0, 2 * TILE.half_block)[None, None, :]
    column = tl.arange(0, TILE.nope_block)[None, None, :]
    from_rope = stream.rope + token * stream.rope_token + head.to(tl.int64) * stream.rope_head
    to_row = token * stream.out_token + head.to(tl.int64) * stream.out_head
    # Loads are issued in program order. The cosines wait for the position, and all else of the rotation for them.
    cos = tl.load(cosines + half, mask=half < TILE.half)
    sin = tl.load(cosines + TILE.half + half, mask=half < TILE.half)
    if TILE.nope > 0:
        from_nope = stream.nope + token * stream.nope_token + head.to(tl.int64) * stream.nope_head
        straight = tl.load(from_nope + column, mask=exists & (column < TILE.nope))
    if TILE.interleaved:
        pairs = tl.load(from_rope + both, mask=exists & (both < 2 * TILE.half)).to(tl.float32)
        a, b = tl.split(tl.reshape(pairs, (TILE.tokens, HEADS, TILE.half_block, 2)))
    else:
        a = tl.load(from_rope + half, mask=exists & (half < TILE.half)).to(tl.float32)
        b = tl.load(from_rope + TILE.half + half, mask=exists & (half < TILE.half)).to(tl.float32)
    if stream.scale_head is None:
        inverse = invert(tl.load(stream.scale))
    else:
        inverse = invert(tl.load(stream.scale + head, mask=head < stream.heads, other=1.0))
    if TILE.nope > 0:
        codes = to_codes(straight, inverse, CAST)
        tl.store(stream.out_nope + to_row + column, codes, mask=exists & (column < TILE.nope))
    a_codes = to_codes(a * cos - b * sin, inverse, CAST)
    b_codes = to_codes(b * cos + a * sin, inverse, CAST)
    to_rope = stream.out_rope + to_row
    if TILE.interleaved:
        shape: tl.constexpr = (TILE.tokens, HEADS, 2 * TILE.half_block)
        joined = tl.reshape(tl.join(a_codes, b_codes), shape)
        tl.store(to_rope + both, joined, mask=exists & (both < 2 * TILE.half))
    else:
        tl.store(to_rope + half, a_codes, mask=exists & (half < TILE.half))
        tl.store(to_rope + TILE.half + half, b_codes, mask=exists & (half < TILE.half))


@triton.jit(do_not_specialize=["tokens"])
def _kernel(
    query,
    key,
    tokens,
    positions,
    cos_sin,
    stride_cos_sin,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
    CAST: tl.constexpr,
) -> None:
    # The blocks of Q's heads and of K's follow each other, token by token.
    program = tl.program_id(0)
    block = program % (TILE.q_blocks + TILE.kv_blocks)
    token = program // (TILE.q_blocks + TILE.kv_blocks) * TILE.tokens + tl.arange(0, TILE.tokens)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    position = tl.load(positions + token, mask=token < tokens, other=0).to(tl.int64)
    cosines = cos_sin + (position * stride_cos_sin)[:, None, None]
    exists = (token < tokens)[:, None, None]
    token = token.to(tl.int64)[:, None, None]
    if block < TILE.q_blocks:
        head = block * TILE.q_heads
        _rotate_and_store(query, head, token, exists, cosines, TILE.q_heads, TILE, CAST)
    else:
        head = (block - TILE.q_blocks) * TILE.kv_heads
        _rotate_and_store(key, head, token, exists, cosines, TILE.kv_heads, TILE, CAST)


def rope_quantize(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    *,
    rope_dim: int | None = None,
    rope_last: bool = False,
    interleaved: bool = False,
    key_rope: Tensor | None = None,
    out_q: Tensor | None = None,
    out_k: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate and quantise Q and K.

    Args:
        query: [tokens, q_heads, dim], bfloat16, float16 or float32; any strides but the last, which is 1 in all.
        key: [tokens, kv_heads, dim], dtype of ``query``; without its rotary part where ``key_rope`` is given.
        positions: [tokens], int32 or int64, rows of ``cos_sin``; they lie on the device and are not checked.
        cos_sin: [max_positions, rope_dim] float32, the cosines of all pairs, then their sines.
        q_scale: float32 on the device, one element or ``q_heads``.
        k_scale: float32 on the device, one element or ``kv_heads``.
        rope_dim: rotary columns of a head, even; the width of ``cos_sin`` where not given, and equal to it.
        rope_last: the rotary columns are a head's last ones, in inputs and outputs, rather than its first.
        interleaved: the elements of a rotary pair are neighbours, rather than half of ``rope_dim`` apart.
        key_rope: [tokens, 1, rope_dim], shared by the heads, or [tokens, kv_heads, rope_dim].
        out_q: [tokens, q_heads, dim], FP8, any strides but the last; allocated where not given.
        out_k: [tokens, kv_heads, dim], likewise, of the same format.
        dtype: the FP8 format of outputs that are not given.
        pdl: start while the kernel in front ends (:mod:`fp8kv.kernels.pdl`).

    Returns:
        ``out_q`` and ``out_k``.

    Raises:
        KernelArgumentError: an argument's shape, dtype, device or stride does not fit.
    """
    width = cos_sin.shape[-1] if rope_dim is None else rope_dim
    check_rope(query, key, key_rope, positions, cos_sin, width)
    tokens, q_heads, dim = query.shape
    kv_heads = key.shape[1]
    require_scale("q_scale", q_scale, q_heads)
    require_scale("k_scale", k_scale, kv_heads)
    require_same_device(query=query, key=key, key_rope=key_rope, positions=positions)
    require_same_device(
        query=query, cos_sin=cos_sin, q_scale=q_scale, k_scale=k_scale, out_q=out_q, out_k=out_k
    )
    outputs = {"out_q": (out_q, query.shape), "out_k": (out_k, (tokens, kv_heads, dim))}
    out_q, out_k = fp8_outputs(outputs, dtype, query.device)
    if tokens * (q_heads + kv_heads) == 0:
        return out_q, out_k
    tile = _tile(q_heads, kv_heads, dim - width, width // 2, interleaved)
    split = partial(split_columns, rope_dim=width, rope_last=rope_last)
    key_parts = split(key) if key_rope is None else (key, key_rope)
    overlaps = uses_pdl(pdl, query.device)
    _kernel[(triton.cdiv(tokens, tile.tokens) * (tile.q_blocks + tile.kv_blocks),)](
        rope_stream(*split(query), *split(out_q), q_scale),
        rope_stream(*key_parts, *split(out_k), k_scale),
        tokens,
        positions,
        cos_sin,
        cos_sin.stride(0),
        TILE=tile,
        PDL=overlaps,
        CAST=plan_cast(out_q.dtype, out_q.device),
        num_warps=_warps(tile, tokens * (q_heads + kv_heads)),
        enable_fp_fusion=False,
        **launch_options(overlaps),
    )
    return out_q, out_k


def _tile(q_heads: int, kv_heads: int, nope: int, half: int, interleaved: bool) -> _Tile:
    q_tile, kv_tile = _tile_heads(q_heads), _tile_heads(kv_heads)
    return _Tile(
        interleaved=interleaved,
        nope=nope,
        half=half,
        nope_block=triton.next_power_of_2(max(nope, 1)),
        half_block=triton.next_power_of_2(half),
        tokens=_ROWS // max(q_tile, kv_tile),
        q_heads=q_tile,
        kv_heads=kv_tile,
        q_blocks=triton.cdiv(q_heads, q_tile),
        kv_blocks=triton.cdiv(kv_heads, kv_tile),
    )


def _tile_heads(heads: int) -> int:
    """Return the power of two up to ``_ROWS`` that leaves fewest heads of a tile idle, the largest such one."""
    sizes = [1 << bit for bit in range(_ROWS.bit_length()) if 1 << bit < 2 * heads] or [1]
    large = [size for size in sizes if size >= 8] or sizes[-1:]
    return min(large, key=lambda size: (triton.cdiv(heads, size) * size, -size))


def _warps(tile: _Tile, rows: int) -> int:
    """Return the warps of a program, such that a thread rotates 16 elements and quantises up to 32 others."""
    columns = max(2 * tile.half_block, tile.nope_block // 2)
    warps = min(max(columns * _ROWS // 512, 1), 8)
    # Few rows are bound by latency: a thread gets half as many.
    return 2 * warps if rows <= 1 << 16 and warps < 8 else warps
