"""``rope_quantize``: rotary embedding and quantisation of Q and K in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8kv.kernels.rope_quantize import reference_rope_quantize, rope_quantize

from .case import Case, Problem, Target
from .problems import K_SCALE, V_SCALE, differing_share, normal, scale_tensor

POSITIONS = 1 << 15


@dataclass(frozen=True)
class Shape:
    """One model's rotary embedding: MLA rotates the last part of a head, with one K part for all heads."""

    name: str
    tokens: int
    q_heads: int
    kv_heads: int
    dim: int
    rope_dim: int
    mla: bool
    target: Target | None = None


SHAPES = [
    Shape("MLA 128x192 T8192", 8192, 128, 128, 192, 64, True, Target(fraction=0.8)),
    Shape("MLA 128x192 T1024", 1024, 128, 128, 192, 64, True),
    Shape("MLA 128x192 T64", 64, 128, 128, 192, 64, True),
    Shape("48/8 d128 T8192", 8192, 48, 8, 128, 64, False),
    Shape("48/8 d128 T64", 64, 48, 8, 128, 64, False),
]


def cases() -> list[Case]:
    """Return all shapes."""
    return [_case(shape) for shape in SHAPES]


def _case(shape: Shape) -> Case:
    key_dim = shape.dim - shape.rope_dim if shape.mla else shape.dim

    def build(copies: int, tiny: bool, device: str = "cuda") -> Problem:
        tokens = shape.tokens
        query = normal(copies, tokens, shape.q_heads, shape.dim, device=device)
        key = normal(copies, tokens, shape.kv_heads, key_dim, device=device)
        rope = normal(copies, tokens, 1, shape.rope_dim, device=device)
        positions = torch.arange(tokens, device=device).repeat(copies, 1)
        angles = torch.rand(POSITIONS, shape.rope_dim // 2, device=device) * 6.28
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
        scales = [scale_tensor(scale, device=device) for scale in (K_SCALE, V_SCALE)]
        code = {"dtype": torch.float8_e4m3fn, "device": device}
        out_q = torch.empty(query.shape, **code)
        out_k = torch.empty(copies, tokens, shape.kv_heads, shape.dim, **code)

        def inputs(i: int) -> tuple[tuple, dict]:
            options = {"rope_dim": shape.rope_dim}
            if shape.mla:
                options |= {"rope_last": True, "interleaved": True, "key_rope": rope[i]}
            return (query[i], key[i], positions[i], cos_sin, *scales), options

        def call(i: int) -> None:
            arguments, options = inputs(i)
            rope_quantize(*arguments, **options, out_q=out_q[i], out_k=out_k[i])

        def error() -> float:
            arguments, options = inputs(0)
            expected_q, expected_k = reference_rope_quantize(*arguments, **options)
            q_share = differing_share(out_q[0], expected_q)
            return max(q_share, differing_share(out_k[0], expected_k))

        return Problem([lambda i=i: call(i) for i in range(copies)], error)

    heads = shape.q_heads + shape.kv_heads
    values = shape.q_heads * shape.dim + shape.kv_heads * key_dim
    shared = shape.rope_dim if shape.mla else 0
    # cos and sin are float32, a position is int64
    per_token = values * 2 + shared * 2 + heads * shape.dim + shape.rope_dim * 4 + 8
    size = shape.tokens * per_token
    return Case("rope_quantize", shape.name, size, 0, build, size, shape.target)
