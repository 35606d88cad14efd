"""``cache_write``: K and V of 8 heads, quantised and written to random slots of pages of 16 tokens."""

from __future__ import annotations

import torch

from fp8kv.kernels.cache_write import cache_write, reference_cache_write

from .case import Case, Problem, Target
from .problems import K_SCALE, V_SCALE, differing_share, normal, scale_tensor, slots

HEADS, HEAD_DIM, PAGE_SIZE = 8, 128, 16
CAPACITY = 1 << 17
TARGETS_US = {1: 2.1, 64: 2.1, 1024: 3.0, 8192: 13.5}


def cases() -> list[Case]:
    """Return all shapes."""
    rows = [_case(tokens, Target(time_us=target)) for tokens, target in TARGETS_US.items()]
    return rows + [_case(tokens, None, pdl=True) for tokens in TARGETS_US]


def _case(tokens: int, target: Target | None, pdl: bool = False) -> Case:
    def build(copies: int, tiny: bool, device: str = "cuda") -> Problem:
        capacity = max(CAPACITY, copies * tokens)
        key = normal(copies, tokens, HEADS, HEAD_DIM, device=device)
        value = normal(copies, tokens, HEADS, HEAD_DIM, device=device)
        shape = (capacity // PAGE_SIZE, PAGE_SIZE, HEADS, HEAD_DIM)
        k_cache, v_cache = (
            torch.zeros(shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
            for _ in range(2)
        )
        places = slots(copies, tokens, capacity, device=device)
        scales = [scale_tensor(scale, device=device) for scale in (K_SCALE, V_SCALE)]

        def call(i: int) -> None:
            cache_write(key[i], value[i], k_cache, v_cache, places[i], *scales, pdl=pdl)

        def error() -> float:
            expected = [torch.zeros_like(k_cache), torch.zeros_like(v_cache)]
            used = places[[0, copies - 1]].flatten()
            for i in {0, copies - 1}:
                reference_cache_write(key[i], value[i], *expected, places[i], *scales)
            found = torch.cat([_rows(cache)[used] for cache in (k_cache, v_cache)])
            return differing_share(found, torch.cat([_rows(cache)[used] for cache in expected]))

        return Problem([lambda i=i: call(i) for i in range(copies)], error)

    size = tokens * (2 * HEADS * HEAD_DIM * 3 + 8)
    shape = f"{HEADS}x{HEAD_DIM} K+V T{tokens}{' PDL' if pdl else ''}"
    return Case("cache_write", shape, size, 0, build, size, target)


def _rows(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.uint8).flatten(0, 1)
