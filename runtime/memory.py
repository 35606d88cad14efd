"""How many cache pages a device has room for, beside the weights and what the largest step takes meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.batch import Batch, make_batch
from fp8kv.runtime.limits import EngineLimits
from fp8kv.runtime.sampling import MAX_LOGPROBS, SamplingParameters, sample

CPU_CACHE_BYTES = 1 << 30
"""Of the cache on a CPU, at most, where nobody says how many pages it has."""

_HARDEST = SamplingParameters(max_tokens=1, temperature=1.0, top_p=0.9, seed=0, logprobs=MAX_LOGPROBS)  # fmt: skip


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a GPU.

    Attributes:
        total: that it has.
        used: taken by the weights, by CUDA itself and by other processes.
        activations: that the largest step takes for as long as it runs.
    """

    total: int
    used: int
    activations: int

    def cache_bytes(self, fraction: float) -> int:
        """Return what is left for the cache if all together may take ``fraction`` of the GPU."""
        return int(self.total * fraction) - self.used - self.activations


def measure_activations(
    forward: Callable[[Batch], Tensor],
    limits: EngineLimits,
    page_size: int,
    device: torch.device,
) -> int:
    """Run the largest step that ``limits`` allow and return the bytes that it took at its peak.

    Args:
        forward: of a model over a cache of :func:`pages_of_largest` pages.
        limits: of a step.
        page_size: tokens of a page.
        device: a GPU.

    Raises:
        RequestError: the step does not fit.
    """
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        run_largest(forward, limits, page_size, device)
    except torch.OutOfMemoryError:
        raise RequestError(
            f"max_batch_tokens {limits.max_batch_tokens} with max_sequences {limits.max_sequences} take more memory "
            f"than {device} has left: lower them or use a larger GPU"
        ) from None
    return torch.cuda.max_memory_allocated(device) - before


def read_memory(device: torch.device, activations: int) -> DeviceMemory:
    """Return what a GPU has and what is taken of it."""
    # what torch keeps for later would be taken for used
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, total - free, activations)


def run_largest(
    forward: Callable[[Batch], Tensor],
    limits: EngineLimits,
    page_size: int,
    device: torch.device | str,
) -> None:
    """Run a step of as many tokens and sequences as ``limits`` allow, whose next tokens are the hardest to choose."""
    lengths = _largest_lengths(limits)
    pages = iter(range(pages_of_largest(limits, page_size)))
    sequences = [
        ([0] * length, 0, [next(pages) for _ in range(-(-length // page_size))])
        for length in lengths
    ]
    logits = forward(make_batch(sequences, page_size, device))
    sample(logits, [_HARDEST] * len(lengths), [0] * len(lengths)).read()


def pages_of_largest(limits: EngineLimits, page_size: int) -> int:
    """Return how many pages :func:`run_largest` writes."""
    return sum(-(-length // page_size) for length in _largest_lengths(limits))


def pages_that_fit(
    budget: int, page_bytes: int, page_size: int, limits: EngineLimits, device: torch.device
) -> int:
    """Return the pages for ``budget`` bytes, no more than all seats at full length can fill.

    Raises:
        RequestError: there is no room for one.
    """
    num_pages = budget // page_bytes
    if num_pages < 1:
        raise RequestError(
            f"{max(budget, 0)} bytes of the memory of {device} are left for the cache, of which one page takes "
            f"{page_bytes}: raise memory_fraction, lower max_batch_tokens or use a larger GPU"
        )
    if limits.max_positions is None:
        return num_pages
    return min(num_pages, limits.max_sequences * -(-limits.max_positions // page_size))


def _largest_lengths(limits: EngineLimits) -> list[int]:
    """Return the new tokens of each sequence: many sequences have many logits, many tokens large layers."""
    count = min(limits.max_sequences, limits.max_batch_tokens)
    least, more = divmod(limits.max_batch_tokens, count)
    most = limits.max_positions or limits.max_batch_tokens
    return [min(most, least + (row < more)) for row in range(count)]
