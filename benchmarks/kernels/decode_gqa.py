"""``decode_gqa``: one query token per sequence over a paged FP8 cache, BF16 query and output.

Pages of 16 tokens, heads next to one another (NHD) and head dimension 128, where the name does not say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8kv.kernels.decode_gqa import decode_gqa, reference_decode_gqa
from fp8kv.kernels.layout import PagedLayout

from .case import KIB, Case, Problem, Target, length_name
from .problems import (
    K_SCALE,
    V_SCALE,
    normal,
    normal_codes,
    page_tables,
    relative_error,
    scale_tensor,
    some,
)

PAGES = PagedLayout(16)
HEADS = [(48, 8), (8, 1), (32, 8)]
LENGTHS = {1: (1, 8, 32, 64, 192), 16: (1, 8, 32), 64: (1, 8, 32), 128: (1, 8, 32)}
TARGETS_US = {"48/8 B1 L32K": 24, "48/8 B1 L8K": 10, "8/1 B1 L64K": 12, "48/8 B16 L1K": 13}


@dataclass(frozen=True)
class Shape:
    """One batch of sequences of equal length, and how its cache is laid out."""

    q_heads: int
    kv_heads: int
    batch: int
    tokens: int
    layout: PagedLayout = PAGES
    head_dim: int = 128
    note: str = ""

    @property
    def name(self) -> str:
        """What the tables call it."""
        length = length_name(self.tokens)
        return f"{self.q_heads}/{self.kv_heads} B{self.batch} L{length}{self.note}"


OTHERS = [
    Shape(48, 8, 64, 8 * KIB, PagedLayout(64), note=" pages of 64"),
    Shape(48, 8, 64, 8 * KIB, PagedLayout(16, "HND"), note=" HND"),
    Shape(32, 8, 64, 8 * KIB, head_dim=64, note=" d64"),
    Shape(16, 4, 64, 8 * KIB, head_dim=256, note=" d256"),
]


def cases() -> list[Case]:
    """Return all shapes."""
    peers = [
        Shape(q_heads, kv_heads, batch, length * KIB)
        for q_heads, kv_heads in HEADS
        for batch, lengths in LENGTHS.items()
        for length in lengths
    ]
    return [_case(shape) for shape in peers + OTHERS]


def _case(shape: Shape) -> Case:
    batch, tokens, head_dim, layout = shape.batch, shape.tokens, shape.head_dim, shape.layout

    def build(copies: int, tiny: bool, device: str = "cuda") -> Problem:
        tables, pages = page_tables(
            copies, batch, tokens, layout.page_size, device=device, tiny=tiny
        )
        sides = (layout.page_size, shape.kv_heads)
        order = sides if layout.order == "NHD" else sides[::-1]
        caches = [
            normal_codes((pages, *order, head_dim), scale, device=device, tiny=tiny)
            for scale in (K_SCALE, V_SCALE)
        ]
        if layout.order == "HND":
            caches = [cache.transpose(1, 2) for cache in caches]
        query = normal(copies, batch, shape.q_heads, head_dim, device=device)
        lengths = torch.full((batch,), 1 if tiny else tokens, dtype=torch.int32, device=device)
        scales = [scale_tensor(scale, device=device) for scale in (K_SCALE, V_SCALE)]
        out = torch.empty_like(query)
        limits = {"sm_scale": head_dim**-0.5, "max_seq_len": tokens}

        def call(i: int) -> None:
            decode_gqa(query[i], *caches, tables[i], lengths, *scales, **limits, out=out[i])

        def error() -> float:
            errors = []
            for copy in {0, copies - 1}:
                for row in some(batch):
                    one = slice(row, row + 1)
                    expected = reference_decode_gqa(
                        query[copy, one], *caches, tables[copy, one], lengths[one], *scales,
                        **limits, out_dtype=torch.float32,
                    )  # fmt: skip
                    errors.append(relative_error(out[copy, one], expected))
            return max(errors)

        return Problem([lambda i=i: call(i) for i in range(copies)], error)

    cache = batch * tokens * shape.kv_heads * 2 * head_dim
    # queries and outputs in BF16; the page table as for pages of 64, whatever the page size
    size = cache + 4 * batch * shape.q_heads * head_dim + batch * tokens // 64 * 4
    flops = 4 * batch * shape.q_heads * tokens * head_dim
    return Case("decode_gqa", shape.name, size, flops, build, size, _target(shape))


def _target(shape: Shape) -> Target | None:
    if shape.name in TARGETS_US:
        return Target(time_us=TARGETS_US[shape.name])
    long_enough = shape.tokens >= 8 * KIB if shape.batch > 1 else shape.tokens == 192 * KIB
    if long_enough and shape.kv_heads == 8 and not shape.note:
        return Target(fraction=0.93)
    return None
