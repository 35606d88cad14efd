"""``gather``: 64 sequences of 4K tokens from FP8 pages of 16 to contiguous BF16."""

from __future__ import annotations

import torch

from fp8kv.kernels.gather import gather, gather_rows, reference_gather, reference_gather_rows

from .case import Case, Problem, Target
from .problems import K_SCALE, V_SCALE, normal_codes, page_tables, relative_error, scale_tensor

BATCH, TOKENS, PAGE_SIZE = 64, 4096, 16
HEADS, HEAD_DIM = 8, 128
ROW = 576
TOTAL = BATCH * TOKENS
CHECKED = 4
TARGET = Target(fraction=0.92)


def cases() -> list[Case]:
    """Return all shapes."""
    table = BATCH * TOKENS // PAGE_SIZE * 4
    sizes = [TOTAL * width * 3 + table for width in (2 * HEADS * HEAD_DIM, ROW)]
    return [
        Case("gather", "64x4K 8x128 K+V", sizes[0], 0, _build_heads, sizes[0], TARGET),
        Case("gather", "64x4K MLA576", sizes[1], 0, _build_rows, sizes[1], TARGET),
    ]


def _build_heads(copies: int, tiny: bool, device: str = "cuda") -> Problem:
    tables, pages = page_tables(copies, BATCH, TOKENS, PAGE_SIZE, device=device, tiny=tiny)
    shape = (pages, PAGE_SIZE, HEADS, HEAD_DIM)
    k_cache = normal_codes(shape, K_SCALE, device=device, tiny=tiny)
    v_cache = normal_codes(shape, V_SCALE, device=device, tiny=tiny)
    scales = [scale_tensor(scale, device=device) for scale in (K_SCALE, V_SCALE)]
    starts = _starts(BATCH, device)
    out_k, out_v = (
        torch.empty(TOTAL, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device) for _ in range(2)
    )

    def call(i: int) -> None:
        gather(
            k_cache, v_cache, tables[i], starts, *scales,
            total_tokens=TOTAL, out_k=out_k, out_v=out_v,
        )  # fmt: skip

    def error() -> float:
        call(0)
        few, total = _starts(CHECKED, device), CHECKED * TOKENS
        k, v = reference_gather(
            k_cache, v_cache, tables[0, :CHECKED], few, *scales,
            total_tokens=total, dtype=torch.float32,
        )  # fmt: skip
        return max(relative_error(out_k[:total], k), relative_error(out_v[:total], v))

    return Problem([lambda i=i: call(i) for i in range(copies)], error)


def _build_rows(copies: int, tiny: bool, device: str = "cuda") -> Problem:
    tables, pages = page_tables(copies, BATCH, TOKENS, PAGE_SIZE, device=device, tiny=tiny)
    cache = normal_codes((pages, PAGE_SIZE, ROW), K_SCALE, device=device, tiny=tiny)
    scale = scale_tensor(K_SCALE, device=device)
    starts = _starts(BATCH, device)
    out = torch.empty(TOTAL, ROW, dtype=torch.bfloat16, device=device)

    def call(i: int) -> None:
        gather_rows(cache, tables[i], starts, scale, total_tokens=TOTAL, out=out)

    def error() -> float:
        call(0)
        few, total = _starts(CHECKED, device), CHECKED * TOKENS
        expected = reference_gather_rows(
            cache, tables[0, :CHECKED], few, scale, total_tokens=total, dtype=torch.float32
        )
        return relative_error(out[:total], expected)

    return Problem([lambda i=i: call(i) for i in range(copies)], error)


def _starts(batch: int, device: str) -> torch.Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * TOKENS
