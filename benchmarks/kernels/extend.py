"""``extend``: new tokens over an FP8 prefix, causal, BF16 query and output.

``48/8 8x(8K+512)`` is eight sequences with 8192 cached and 512 new tokens each. As in the peers' runs K and V of the new
tokens are in the paged cache already; in the shapes with ``BF16 new`` they come beside it, unquantised. ``MLA 128`` is
the expanded prefill of MLA: 128 heads, K of 192 and V of 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fp8kv.kernels.extend import extend, reference_extend

from .case import KIB, Case, Problem, Target, length_name
from .problems import (
    K_SCALE,
    V_SCALE,
    normal,
    normal_codes,
    page_tables,
    relative_error,
    scale_tensor,
)

PAGE_SIZE = 16
TARGET = Target(tflops=400)


@dataclass(frozen=True)
class Shape:
    """Sequences with ``prefix`` cached and ``new`` uncached tokens each.

    Attributes:
        cached: whether K and V of the new tokens are in the cache, too.
    """

    batch: int
    prefix: int
    new: int
    cached: bool
    q_heads: int = 48
    kv_heads: int = 8
    k_dim: int = 128
    v_dim: int = 128
    target: Target | None = TARGET

    @property
    def name(self) -> str:
        """What the tables call it."""
        heads = "MLA 128" if self.k_dim != self.v_dim else f"{self.q_heads}/{self.kv_heads}"
        text = f"{heads} {self.batch}x({_length(self.prefix)}+{_length(self.new)})"
        return text if self.cached else f"{text} BF16 new"


SHAPES = [
    Shape(8, 8 * KIB, 512, cached=True),
    Shape(1, 0, 8 * KIB, cached=True),
    Shape(8, 8 * KIB, 512, cached=False),
    Shape(1, 0, 8 * KIB, cached=False),
    Shape(1, 0, 8 * KIB, False, q_heads=128, kv_heads=128, k_dim=192, v_dim=128, target=None),
]


def cases() -> list[Case]:
    """Return all shapes."""
    return [_case(shape) for shape in SHAPES]


def _case(shape: Shape) -> Case:
    batch, prefix, new, dims = shape.batch, shape.prefix, shape.new, (shape.k_dim, shape.v_dim)
    in_pages = prefix + new if shape.cached else prefix

    def build(copies: int, tiny: bool, device: str = "cuda") -> Problem:
        query = normal(copies, batch * new, shape.q_heads, shape.k_dim, device=device)
        fresh, caches, tables = [None, None], [None, None], None
        if not shape.cached:
            fresh = [
                normal(copies, batch * new, shape.kv_heads, dim, device=device) for dim in dims
            ]
        if in_pages:
            tables, pages = page_tables(
                copies, batch, in_pages, PAGE_SIZE, device=device, tiny=tiny
            )
            caches = [
                normal_codes(
                    (pages, PAGE_SIZE, shape.kv_heads, dim), scale, device=device, tiny=tiny
                )
                for dim, scale in zip(dims, (K_SCALE, V_SCALE), strict=True)
            ]
        scales = [scale_tensor(scale, device=device) for scale in (K_SCALE, V_SCALE)]
        prefix_lens = torch.full((batch,), prefix, dtype=torch.int32, device=device)
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * new
        out = query.new_empty(copies, batch * new, shape.q_heads, shape.v_dim)
        limits = {
            "sm_scale": shape.k_dim**-0.5,
            "max_new_tokens": new,
            "max_prefix_len": prefix,
        }

        def call(i: int) -> None:
            extend(
                query[i], *_each(fresh, i), *caches, None if tables is None else tables[i],
                prefix_lens, cu_seqlens, *scales, **limits, out=out[i],
            )  # fmt: skip

        def error() -> float:
            """Compare the first and the last KV head of the last sequence: all of it would not fit."""
            errors = []
            rows, last = slice((batch - 1) * new, batch * new), slice(batch - 1, batch)
            group = shape.q_heads // shape.kv_heads
            for head in (0, shape.kv_heads - 1):
                q_heads, kv = slice(head * group, (head + 1) * group), slice(head, head + 1)
                expected = reference_extend(
                    query[0, rows, q_heads], *_each(fresh, (0, rows, kv)),
                    *_each(caches, (slice(None), slice(None), kv)),
                    None if tables is None else tables[0, last],
                    prefix_lens[last], cu_seqlens[:2], *scales, **limits, out_dtype=torch.float32,
                )  # fmt: skip
                errors.append(relative_error(out[0, rows, q_heads], expected))
            return max(errors)

        return Problem([lambda i=i: call(i) for i in range(copies)], error)

    queries = batch * new * shape.q_heads * sum(dims) * 2
    fp8 = batch * in_pages * shape.kv_heads * sum(dims)
    bf16 = 0 if shape.cached else batch * new * shape.kv_heads * sum(dims) * 2
    pairs = batch * (new * prefix + new * (new + 1) // 2)
    size = queries + fp8 + bf16
    flops = 2 * shape.q_heads * pairs * sum(dims)
    return Case("extend", shape.name, size, flops, build, size, shape.target)


def _each(tensors: list[torch.Tensor | None], index: Any) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor[index] for tensor in tensors]


def _length(tokens: int) -> str:
    return length_name(tokens) if tokens >= KIB else str(tokens)
