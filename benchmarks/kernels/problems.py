"""The data of the benchmarks: standard normal values, pages in random order, and how an error is stated.

All copies of a problem live in one cache and own disjoint random pages of it, as the sequences of a server do. A large
cache is filled by repeating 32 MB of random codes: the kernels cannot know, and building it takes no time.
"""

from __future__ import annotations

import torch
from torch import Tensor

# a normal sample of this size reaches about 5.4, so K and V use the whole range of e4m3 and nothing clips
K_SCALE = 0.0125
V_SCALE = 0.0175
POOL = 1 << 25
MOST_CHECKED = 4


def normal_codes(
    shape: tuple[int, ...], scale: float, *, device: str, tiny: bool = False
) -> Tensor:
    """Return e4m3 codes of standard normal values divided by ``scale``; zeros when ``tiny``."""
    codes = torch.zeros(shape, dtype=torch.uint8, device=device)
    if not tiny:
        flat = codes.view(-1)
        size = min(POOL, flat.numel())
        values = torch.randn(size, device=device) / scale
        pool = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        for start in range(0, flat.numel(), size):
            part = flat[start : start + size]
            part.copy_(pool[: part.numel()])
    return codes.view(torch.float8_e4m3fn)


def page_tables(
    copies: int, batch: int, tokens: int, page_size: int, *, device: str, tiny: bool = False
) -> tuple[Tensor, int]:
    """Return page tables and the number of pages that they use.

    Returns:
        [copies, batch, pages of a sequence] int32, every page once and in random order (``tiny``: all page 0), and
        how many pages the cache needs.
    """
    each = -(-tokens // page_size)
    if tiny:
        return torch.zeros(copies, batch, each, dtype=torch.int32, device=device), 1
    count = copies * batch * each
    order = torch.randperm(count, device=device)
    return order.int().view(copies, batch, each), count


def slots(copies: int, tokens: int, capacity: int, *, device: str) -> Tensor:
    """Return [copies, tokens] int64: distinct slots of a cache of ``capacity`` tokens in random order."""
    order = torch.randperm(capacity, device=device)
    return order[: copies * tokens].view(copies, tokens)


def normal(*shape: int, device: str) -> Tensor:
    """Return bfloat16 standard normal values."""
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def scale_tensor(value: float, *, device: str) -> Tensor:
    """Return a scale as the kernels take it: float32, one element."""
    return torch.full((1,), value, dtype=torch.float32, device=device)


def some(count: int) -> list[int]:
    """Return up to four of ``count`` indices, the first and the last among them."""
    return sorted({i * (count - 1) // (MOST_CHECKED - 1) for i in range(MOST_CHECKED)})


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of ``expected``."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def differing_share(found: Tensor, expected: Tensor) -> float:
    """Return the share of FP8 codes that differ in any bit."""
    return float((found.view(torch.uint8) != expected.view(torch.uint8)).double().mean())
