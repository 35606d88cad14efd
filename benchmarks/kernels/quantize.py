"""``quantize``: BF16 to e4m3 with one scale, rows of any width."""

from __future__ import annotations

import torch

from fp8kv.kernels.quantize import quantize, reference_quantize

from .case import Case, Problem, Target
from .problems import K_SCALE, differing_share, normal, scale_tensor

SHAPES = {
    (8192, 7168): Target(fraction=0.95),
    (8192, 8192): Target(fraction=0.95),
    (64, 576): Target(time_us=1.8),
    (8192, 24576): Target(fraction=0.95),
}


def cases() -> list[Case]:
    """Return all shapes."""
    plain = [_case(rows, width, target) for (rows, width), target in SHAPES.items()]
    return [*plain, _case(64, 576, None, pdl=True)]


def _case(rows: int, width: int, target: Target | None, pdl: bool = False) -> Case:
    def build(copies: int, tiny: bool, device: str = "cuda") -> Problem:
        x = normal(copies, rows, width, device=device)
        scale = scale_tensor(K_SCALE, device=device)
        out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=device)

        def error() -> float:
            ends = [0, copies - 1]
            expected = torch.stack([reference_quantize(x[i], scale) for i in ends])
            return differing_share(out[ends], expected)

        calls = [lambda i=i: quantize(x[i], scale, out=out[i], pdl=pdl) for i in range(copies)]
        return Problem(calls, error)

    size = rows * width * 3
    name = f"{rows}x{width}{' PDL' if pdl else ''}"
    return Case("quantize", name, size, 0, build, size, target)
