"""``rope_cache_write``: a layer's Q, K and V on their way from the projection to attention and to random slots of pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8kv.kernels.rope_cache_write import reference_rope_cache_write, rope_cache_write

from .case import Case, Problem, Target
from .problems import K_SCALE, V_SCALE, differing_share, normal, scale_tensor, slots

PAGE_SIZE = 16
CAPACITY = 1 << 17


@dataclass(frozen=True)
class Shape:
    """One model's heads and one batch; K and V have the same width, and ``rope_dim`` columns are rotated."""

    name: str
    tokens: int
    q_heads: int
    kv_heads: int
    dim: int
    rope_dim: int
    interleaved: bool = False
    pdl: bool = False
    target: Target | None = None


# a target is 1.3 times cache_write's time for the same K and V plus that of Q's bytes at the rate of a copy
SHAPES = [
    Shape("32/8 d128 T1", 1, 32, 8, 128, 128),
    Shape("32/8 d128 T64", 64, 32, 8, 128, 128, target=Target(time_us=2.5)),
    Shape("32/8 d128 T1024", 1024, 32, 8, 128, 128, target=Target(time_us=9.7)),
    Shape("32/8 d128 T8192", 8192, 32, 8, 128, 128, target=Target(time_us=59.0)),
    Shape("32/8 d128 T64 PDL", 64, 32, 8, 128, 128, pdl=True),
    Shape("32/8 d128 T1024 PDL", 1024, 32, 8, 128, 128, pdl=True),
    Shape("48/8 d128 half rotated T64", 64, 48, 8, 128, 64),
    Shape("48/8 d128 half rotated T8192", 8192, 48, 8, 128, 64),
    Shape("32/8 d128 interleaved T8192", 8192, 32, 8, 128, 128, interleaved=True),
]


def cases() -> list[Case]:
    """Return all shapes."""
    return [_case(shape) for shape in SHAPES]


def _case(shape: Shape) -> Case:
    tokens, heads = shape.tokens, (shape.q_heads, shape.kv_heads, shape.kv_heads)

    def build(copies: int, tiny: bool, device: str = "cuda") -> Problem:
        capacity = max(CAPACITY, copies * tokens)
        # Q, K and V are slices of one projection's output
        fused = normal(copies, tokens, sum(heads), shape.dim, device=device)
        query, key, value = fused.split(heads, dim=2)
        angles = torch.rand(copies, tokens, shape.rope_dim // 2, device=device) * 6.28
        cos, sin = (
            torch.cat([half, half], dim=-1).bfloat16() for half in (angles.cos(), angles.sin())
        )
        cache_shape = (capacity // PAGE_SIZE, PAGE_SIZE, shape.kv_heads, shape.dim)
        caches = [
            torch.zeros(cache_shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
            for _ in range(2)
        ]
        places = slots(copies, tokens, capacity, device=device)
        scales = [scale_tensor(scale, device=device) for scale in (K_SCALE, V_SCALE)]
        out_q = torch.empty(
            copies, tokens, shape.q_heads, shape.dim, dtype=torch.bfloat16, device=device
        )

        def arguments(i: int, k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple:
            rotated = (query[i], key[i], value[i], cos[i], sin[i])
            return (*rotated, k_cache, v_cache, places[i], *scales)

        def call(i: int) -> None:
            rope_cache_write(
                *arguments(i, *caches),
                interleaved=shape.interleaved,
                out_q=out_q[i],
                pdl=shape.pdl,
            )

        def error() -> float:
            expected = [torch.zeros_like(cache) for cache in caches]
            last = copies - 1
            for i in {0, last}:
                expected_q = reference_rope_cache_write(
                    *arguments(i, *expected), interleaved=shape.interleaved
                )
            used = places[[0, last]].flatten()
            found = torch.cat([_rows(cache)[used] for cache in caches])
            wanted = torch.cat([_rows(cache)[used] for cache in expected])
            q_share = (out_q[last] != expected_q).float().mean().item()
            return max(q_share, differing_share(found, wanted))

        return Problem([lambda i=i: call(i) for i in range(copies)], error)

    # Q is read and written in 16 bits, K and V are read so and written in 8; the angles' second halves are not read
    size = tokens * (shape.dim * (shape.q_heads * 4 + shape.kv_heads * 6) + shape.rope_dim * 2 + 8)
    return Case("rope_cache_write", shape.name, size, 0, build, size, shape.target)


def _rows(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.uint8).flatten(0, 1)
