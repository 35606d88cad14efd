"""What a benchmark module hands over: the shapes of its kernel, what each costs at least, and how to build it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Ceilings:
    """What the GPU reached in this run without any kernel of ours.

    Attributes:
        copy_tbps: bytes read plus bytes written by a large copy, in TB/s.
        read_tbps: bytes read by a large sum, in TB/s; a pure read can be faster than a copy.
        bf16_tflops: rate of a large bfloat16 matrix product of random data, in TFLOP/s.
        graph_node_us: one tiny kernel in a CUDA graph, in microseconds.
    """

    copy_tbps: float
    read_tbps: float
    bf16_tflops: float
    graph_node_us: float


@dataclass(frozen=True)
class Target:
    """What a kernel is meant to reach at one shape: a share of the floor, a time, or a rate. One of them is given."""

    fraction: float | None = None
    time_us: float | None = None
    tflops: float | None = None

    def as_time_us(self, floor_us: float, flops: int) -> float:
        """Return the target as microseconds."""
        if self.time_us is not None:
            return self.time_us
        if self.fraction is not None:
            return floor_us / self.fraction
        return flops / (self.tflops or math.nan) / 1e6

    def __str__(self) -> str:
        """Say it as the documentation does."""
        if self.time_us is not None:
            return f"{self.time_us:g} us"
        if self.fraction is not None:
            return f"{100 * self.fraction:.0f} %"
        return f"{self.tflops:g} TFLOP/s"


@dataclass(frozen=True)
class Problem:
    """A case in the GPU's memory.

    Attributes:
        calls: the same work on distinct copies of the data; each call is one call of the launcher.
        error: compares what the first and the last call left with the float32 reference.
    """

    calls: list[Callable[[], object]]
    error: Callable[[], float]


@dataclass(frozen=True)
class Case:
    """One shape of one kernel.

    Attributes:
        kernel: name of the kernel's module.
        shape: how the tables call the shape.
        bytes: what the work must read and write at least.
        flops: what the attention must compute at least; 0 for kernels that only move data.
        build: makes the problem from the number of copies. With ``tiny`` the launcher is called as in the real
            problem, on one copy and hardly any data: enough to compile what will be launched.
        copy_bytes: memory of one copy.
        target: what the kernel is meant to reach, if anything is asked of this shape.
    """

    kernel: str
    shape: str
    bytes: int
    flops: int
    build: Callable[[int, bool], Problem]
    copy_bytes: int
    target: Target | None = None

    def floor_us(self, ceilings: Ceilings) -> float:
        """Return the time below which the GPU's measured ceilings do not go, in microseconds."""
        return max(self._memory_us(ceilings), self._matrix_us(ceilings))

    def bound(self, ceilings: Ceilings) -> str:
        """Return which ceiling that is: ``mem`` or ``mma``."""
        return "mem" if self._memory_us(ceilings) >= self._matrix_us(ceilings) else "mma"

    def _memory_us(self, ceilings: Ceilings) -> float:
        return self.bytes / ceilings.copy_tbps / 1e6

    def _matrix_us(self, ceilings: Ceilings) -> float:
        return self.flops / ceilings.bf16_tflops / 1e6


def length_name(tokens: int) -> str:
    """Return 8192 as ``8K``."""
    return f"{tokens // KIB}K"
