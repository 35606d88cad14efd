"""Record what a function launches on the GPU, and launch it again: CUDA graphs of torch, with a way out when they fail."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch


class NotRecordable(Exception):
    """What was to be recorded waits for the GPU on the host, or does what a CUDA graph cannot hold."""


class Recorder(Protocol):
    """Turns functions without arguments and results into what replays them."""

    def rehearse(self, run: Callable[[], None]) -> None:
        """Run once, so that all is compiled and warm.

        Raises:
            NotRecordable: it cannot be recorded.
        """

    def record(self, run: Callable[[], None]) -> Callable[[], None] | None:
        """Return what replays ``run``, which was rehearsed; None where there is no memory to keep it.

        Raises:
            NotRecordable: it cannot be recorded.
        """


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory, since only one of them runs at a time.

    A capture that breaks leaves torch half in it: streams, allocator and random generators. So what would break it, a
    wait for the GPU, is looked for in the rehearsal, which is an ordinary pass. Torch does not find all waits; what it
    misses breaks the capture, and torch is brought back from there.
    """

    def __init__(self, device: torch.device, *, min_free_bytes: int) -> None:
        """Make a recorder.

        Args:
            device: a CUDA device.
            min_free_bytes: with less free memory than this nothing is recorded.
        """
        self._device = device
        self._min_free_bytes = min_free_bytes
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _capture_stream(device)
        self._is_full = False

    def rehearse(self, run: Callable[[], None]) -> None:
        """Run once with every wait for the GPU forbidden."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            # that the mode does not find all waits
            warnings.filterwarnings("ignore", message="Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotRecordable(_reason(error)) from error
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def record(self, run: Callable[[], None]) -> Callable[[], None] | None:
        """Capture a graph of ``run``; nothing of it is executed yet."""
        if self._is_full or self._free_bytes() < self._min_free_bytes:
            return None
        stream = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with self._capture(graph, self._pool):
                run()
        except torch.OutOfMemoryError:
            # torch forgets the pool with its only graph, and must not be asked for it again
            self._is_full = True
            return None
        except RuntimeError as error:
            self._recover(stream)
            raise NotRecordable(_reason(error)) from error
        return graph.replay

    def _recover(self, stream: torch.cuda.Stream) -> None:
        """Bring torch back to what it was in front of a capture that could not be ended."""
        # torch's context manager is still on its own stream
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize(self._device)
        # the allocator returns no memory to the GPU while it believes in a capture
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
        # generators refuse to draw until a capture has ended well
        with self._capture(torch.cuda.CUDAGraph(), None):
            torch.zeros(1, device=self._device)

    def _capture(self, graph: torch.cuda.CUDAGraph, pool: Any) -> torch.cuda.graph:
        # other threads may go on using the GPU: "global" would let them break the capture
        mode = "thread_local"
        return torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode=mode)

    def _free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        return free + reserved - torch.cuda.memory_allocated(self._device)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that everybody captures on, one at a time.

    cuBLAS keeps a workspace for each stream, 32 MiB on an H200, as long as the process lives: with a stream of its own
    every recorder would leave that behind. Torch shares one, too, but on the device that was current at its first use.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _reason(error: BaseException) -> str:
    """Return what went wrong first: an error in a capture is followed by another when the capture ends."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().split("\n")[0]
