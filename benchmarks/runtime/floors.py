"""What the GPU at hand reaches without any code of fp8kv: the ceilings that times are compared with."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

COPY_BYTES = 4 << 30
MATRIX_SECONDS = 1.5


@dataclass(frozen=True)
class Ceilings:
    """Rates of the GPU.

    Attributes:
        copy_tbps: of a copy, bytes read and written.
        bf16_tflops: of a product of 8192 x 8192 matrices, sustained for longer than a second, when the chip is warm.
    """

    copy_tbps: float
    bf16_tflops: float


def measure_ceilings() -> Ceilings:
    return Ceilings(_copy_tbps(), _matrix_tflops())


def _copy_tbps() -> float:
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    best = min(_elapsed(lambda: torch.neg(source, out=target)) for _ in range(8))
    return 2 * COPY_BYTES / best / 1e12


def _matrix_tflops() -> float:
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = torch.empty_like(left)
    start = time.perf_counter()
    while time.perf_counter() - start < MATRIX_SECONDS:
        sample = _elapsed(lambda: [torch.mm(left, right, out=product) for _ in range(50)])
    # the last sample: by then the clock is what the power allows
    return 50 * 2 * 8192**3 / sample / 1e12


def _elapsed(call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
