"""How time is measured.

A CUDA graph holds one call on each of R distinct copies of the problem. Before each replay 256 MB of other data are read,
which leaves nothing of the problem in the L2 cache; R is chosen so that a replay lasts much longer than the two events
around it. A short spin on the GPU lets the host get ahead, so no launch from the host is in the time. The result is the
median over the replays, divided by R. What a launcher does on the device is in it, what it does on the host is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton

from .case import Case, Ceilings

OTHER_BYTES = 256 << 20
SPIN_CYCLES = 200_000
WANTED_REPLAY_US = 200.0
LIKELY_LEAST_US = 1.5
MOST_COPIES = 64
MOST_COPY_BYTES = 12 << 30
WARM_REPLAYS = 2
LEAST_REPLAYS = 9
MOST_REPLAYS = 41
WANTED_SAMPLE_US = 20_000.0
# rows, columns, inner dimension
MATRIX_SHAPES = ((8192, 8192, 8192), (8192, 8192, 4096), (4096, 8192, 16384), (16384, 16384, 4096))


def choose_copies(case: Case, ceilings: Ceilings) -> int:
    """Return R: enough copies for a replay that can be timed, and no more than fit into memory."""
    least_us = max(case.floor_us(ceilings), LIKELY_LEAST_US)
    wanted = math.ceil(WANTED_REPLAY_US / least_us)
    return max(1, min(wanted, MOST_COPIES, MOST_COPY_BYTES // case.copy_bytes))


@triton.jit
def _nothing() -> None:
    pass


class Clock:
    """Times calls on the current GPU. Holds the 256 MB that evict everything else from the cache."""

    def __init__(self) -> None:
        self._other = torch.ones(OTHER_BYTES // 4, dtype=torch.int32, device="cuda")

    def time_us(self, calls: Sequence[Callable[[], object]]) -> float:
        """Return the median time of one call in microseconds."""
        calls[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        for _ in range(WARM_REPLAYS):
            once = self._replay_us(graph)
        replays = int(min(max(WANTED_SAMPLE_US / once, LEAST_REPLAYS), MOST_REPLAYS))
        samples = sorted(self._replay_us(graph) for _ in range(replays))
        return samples[len(samples) // 2] / len(calls)

    def ceilings(self) -> Ceilings:
        """Measure what the GPU reaches without any kernel of ours; of several ways the fastest."""
        copies, reads = zip(*(self._memory_tbps(gib) for gib in (1, 4)), strict=True)
        return Ceilings(
            copy_tbps=max(copies),
            read_tbps=max(reads),
            bf16_tflops=max(self._matrix_tflops(*shape) for shape in MATRIX_SHAPES),
            graph_node_us=self.time_us([lambda: _nothing[(1,)](num_warps=1)] * 256),
        )

    def _memory_tbps(self, gib: int) -> tuple[float, float]:
        """Return the rates of a copy and of a read."""
        source = torch.randn(gib << 28, dtype=torch.float32, device="cuda")
        target = torch.empty_like(source)
        size = source.numel() * source.element_size()
        # in a graph a plain copy is not done by a kernel, and slower than one
        copy_us = min(
            self.time_us([lambda: target.copy_(source)]),
            self.time_us([lambda: torch.neg(source, out=target)]),
        )
        read_us = self.time_us([lambda: source.sum()])
        return 2 * size / copy_us / 1e6, size / read_us / 1e6

    def _matrix_tflops(self, rows: int, columns: int, inner: int) -> float:
        options = {"dtype": torch.bfloat16, "device": "cuda"}
        left, right = torch.randn(rows, inner, **options), torch.randn(columns, inner, **options).T
        product = torch.empty(rows, columns, **options)
        time_us = self.time_us([lambda: torch.mm(left, right, out=product)])
        return 2 * rows * columns * inner / time_us / 1e6

    def _replay_us(self, graph: torch.cuda.CUDAGraph) -> float:
        self._other.sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SPIN_CYCLES)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3
