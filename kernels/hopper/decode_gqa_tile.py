"""Device functions of :mod:`fp8kv.kernels.hopper.decode_gqa`: a tile's way into shared memory, and into the result."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# P is 2^14 times the probability relative to the running maximum, so that tokens far below an attention sink are no
# subnormal numbers in FP16.
P_EXPONENT = gl.constexpr(14.0)


@gluon.jit
def find_pages(start, last_page, table, PAGE_SIZE: gl.constexpr, BOXES: gl.constexpr):
    """Return the pages of the tile at token ``start``, a tuple of BOXES.

    Past the end the last page comes again: so a tile is always as many bytes, and no meaningless entry of the table is
    used.
    """
    pages = (gl.load(table + gl.minimum(start // PAGE_SIZE, last_page)),)
    for box in gl.static_range(1, BOXES):
        page = gl.load(table + gl.minimum(start // PAGE_SIZE + box, last_page))
        pages += (page,)  # type: ignore[assignment]
    return pages


@gluon.jit
def fetch(
    start,
    wanted,
    pages,
    first_page: gl.constexpr,
    kv_head,
    k_source,
    v_source,
    k_ring,
    v_ring,
    barriers,
    slot,
    PAGE_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    K_BLOCK: gl.constexpr,
    V_BLOCK: gl.constexpr,
) -> None:
    """Start the copies of the tile at token ``start`` into ``slot`` of the rings; its barrier counts the bytes."""
    COLUMNS_K: gl.constexpr = min(K_BLOCK, 128)
    COLUMNS_V: gl.constexpr = min(V_BLOCK, 128)
    BOXES: gl.constexpr = max(TILE // PAGE_SIZE, 1)
    barrier = barriers.index(slot)
    mbarrier.expect(barrier, TILE * (K_BLOCK + V_BLOCK), pred=wanted)
    row = start % PAGE_SIZE
    for box in gl.static_range(BOXES):
        page = pages[first_page + box]
        for block in gl.static_range(K_BLOCK // COLUMNS_K):
            place = k_ring.index((slot * (K_BLOCK // COLUMNS_K) + block) * BOXES + box)
            columns = block * COLUMNS_K
            tma.async_copy_global_to_shared(
                k_source, [page, row, kv_head, columns], barrier, place, pred=wanted
            )
        for block in gl.static_range(V_BLOCK // COLUMNS_V):
            place = v_ring.index((slot * (V_BLOCK // COLUMNS_V) + block) * BOXES + box)
            columns = block * COLUMNS_V
            tma.async_copy_global_to_shared(
                v_source, [page, row, kv_head, columns], barrier, place, pred=wanted
            )


@gluon.jit
def _decode_pairs(pairs, E5M2: gl.constexpr):
    """Split 16-bit pairs of codes into two FP16 tensors, two pairs at a time."""
    if E5M2:
        return gl.inline_asm_elementwise(
            """{ .reg .b32 sorted; .reg .b16 low, high; prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e5m2x2 $0, low; cvt.rn.f16x2.e5m2x2 $1, high; }""",
            "=r,=r,r",
            [pairs],
            dtype=[gl.float16, gl.float16],
            is_pure=True,
            pack=2,
        )
    else:
        return gl.inline_asm_elementwise(
            """{ .reg .b32 sorted; .reg .b16 low, high; prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }""",
            "=r,=r,r",
            [pairs],
            dtype=[gl.float16, gl.float16],
            is_pure=True,
            pack=2,
        )


@gluon.jit
def _tokens(start, WARPS: gl.constexpr, WARP_TOKENS: gl.constexpr, layout: gl.constexpr):
    """Return the positions of a tile's tokens, [WARPS, WARP_TOKENS]."""
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, layout))
    token = gl.arange(0, WARP_TOKENS, layout=gl.SliceLayout(0, layout))
    return start + warp[:, None] * WARP_TOKENS + token[None, :]


@gluon.jit
def attend(
    start,
    first,
    last,
    k_tile,
    v_tile,
    query,
    factor,
    soft_cap,
    peak,
    total,
    even,
    odd,
    MMA: gl.constexpr,
    MASKED: gl.constexpr,
    CAPPED: gl.constexpr,
    E5M2: gl.constexpr,
):
    """Add one tile to the running softmax: the flash-attention recurrence (Dao et al., 2022), each warp its own."""
    WARPS: gl.constexpr = k_tile.shape[0]
    WARP_TOKENS: gl.constexpr = k_tile.shape[1]
    HEADS: gl.constexpr = query.shape[2]
    keys = k_tile.load(gl.DotOperandLayout(0, MMA, 4)).to(gl.float16)
    zeros = gl.zeros([WARPS, WARP_TOKENS, HEADS], gl.float32, MMA)
    scores = mma_v2(keys, query, zeros) * factor[:, None, :]
    if CAPPED:
        # cap * tanh(score / cap), in units of log2: factor already has 2 * log2(e) / cap in it.
        scores = soft_cap * (1.0 - 2.0 / (1.0 + gl.exp2(scores)))
    if MASKED:
        token = _tokens(start, WARPS, WARP_TOKENS, gl.SliceLayout(2, MMA))
        scores = gl.where(((token >= first) & (token < last))[:, :, None], scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1))
    decay = gl.exp2(peak - new_peak)
    weights = gl.exp2(scores - (new_peak - P_EXPONENT)[:, None, :])
    total = total * decay + gl.sum(weights, 1)
    weights = gl.convert_layout(weights.to(gl.float16), gl.DotOperandLayout(1, MMA, 2))
    V: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    pairs = v_tile.permute((0, 2, 1)).load(V)
    if MASKED:
        # A page's bytes past the last token may be NaN, and 0 * NaN is NaN.
        token = _tokens(start, WARPS, WARP_TOKENS, gl.SliceLayout(1, V))
        pairs = gl.where((token < last)[:, None, :], pairs, gl.zeros_like(pairs))
    even_values, odd_values = _decode_pairs(pairs, E5M2)
    even = mma_v2(even_values, weights, even * decay[:, None, :])
    odd = mma_v2(odd_values, weights, odd * decay[:, None, :])
    return new_peak, total, even, odd
