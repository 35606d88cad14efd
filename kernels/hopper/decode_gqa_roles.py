"""Device functions of :mod:`fp8kv.kernels.hopper.decode_gqa` for programs of several warps: who copies and who computes.

The warps that compute share each tile's barriers, so what one of them does beside its arithmetic all of them wait for.
Here a warp of its own finds the pages and starts the copies, and the others only say which tiles they are done with.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fp8kv.kernels.hopper.decode_gqa_tile import attend, fetch, find_pages


@gluon.jit
def produce(
    tokens, table, kv_head, k_source, v_source, k_ring, v_ring, filled, released,
    PAGE_SIZE: gl.constexpr, TILE: gl.constexpr, K_BLOCK: gl.constexpr, V_BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """Copy the split's tiles into the rings, each as soon as its place is released."""
    begin, _, last = tokens
    last_page = (gl.maximum(last, 1) - 1) // PAGE_SIZE
    BOXES: gl.constexpr = max(TILE // PAGE_SIZE, 1)
    slot = 0
    # A new barrier counts as one whose odd phase has just ended: the first round waits for nobody.
    phase = 1
    for start in range(begin, last, TILE):
        pages = find_pages(start, last_page, table, PAGE_SIZE, BOXES)
        mbarrier.wait(released.index(slot), phase)
        fetch(
            start, True, pages, 0, kv_head, k_source, v_source, k_ring, v_ring, filled, slot,
            PAGE_SIZE, TILE, K_BLOCK, V_BLOCK,
        )  # fmt: skip
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1


@gluon.jit
def consume(
    tokens, k_tiles, v_tiles, filled, released, rows, factor, soft_cap, state,
    MMA: gl.constexpr, WINDOWED: gl.constexpr, CAPPED: gl.constexpr, E5M2: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Attend the split's tiles and return the running softmax, as the loop of a program without roles does."""
    begin, first, last = tokens
    peak, total, even, odd = state
    TILE: gl.constexpr = k_tiles.shape[1] * k_tiles.shape[2]
    full = begin + gl.maximum(last - begin, 0) // TILE * TILE
    slot = 0
    phase = 0
    for start in range(begin, full, TILE):
        mbarrier.wait(filled.index(slot), phase)
        peak, total, even, odd = attend(
            start, first, last, k_tiles.index(slot), v_tiles.index(slot), rows, factor, soft_cap,
            peak, total, even, odd, MMA, WINDOWED, CAPPED, E5M2,
        )  # fmt: skip
        mbarrier.arrive(released.index(slot), count=1)
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
    if full < last:
        mbarrier.wait(filled.index(slot), phase)
        peak, total, even, odd = attend(
            full, first, last, k_tiles.index(slot), v_tiles.index(slot), rows, factor, soft_cap,
            peak, total, even, odd, MMA, True, CAPPED, E5M2,
        )  # fmt: skip
    return peak, total, even, odd
