"""Puts a loaded model over a paged cache, after finding out how large that may be."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import get_args

import torch

from fp8kv.calibrate.modeling.tap import AttentionModule
from fp8kv.kernels.layout import MAX_PAGE_SIZE, is_page_size
from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.architectures import check_supported
from fp8kv.runtime.backends import BACKENDS, Backend, choose_backend
from fp8kv.runtime.cache_counters import CountingBackend
from fp8kv.runtime.checks import check_choice, check_integer, check_switch
from fp8kv.runtime.decode_graphs import DecodeGraphs
from fp8kv.runtime.fused_modules import fuse_modules
from fp8kv.runtime.limits import EngineLimits
from fp8kv.runtime.loading import LoadedModel
from fp8kv.runtime.memory import (
    CPU_CACHE_BYTES,
    measure_activations,
    pages_of_largest,
    pages_that_fit,
    read_memory,
)
from fp8kv.runtime.model_runner import ModelRunner, Prefill, check_free
from fp8kv.runtime.paged_cache import (
    CacheMode,
    LayerDims,
    PagedCache,
    build_cache,
    bytes_per_token,
    measure_dims,
)
from fp8kv.runtime.paging import PageAllocator

PAGE_SIZE = 64
MEMORY_FRACTION = 0.9

_WITHOUT_SCALES: Mapping[CacheMode, CacheMode] = {"fp8": "fp8-unit", "emulate": "bf16"}
"""Modes of the same size that ask for no scales, and so do not warn that some are missing."""


@dataclass(frozen=True)
class RunnerOptions:
    """How a model runs; what each means is said at :class:`~fp8kv.runtime.llm.LLM`.

    Raises:
        RequestError: a value is out of its range or of the wrong type.
    """

    cache: CacheMode
    backend: str | None
    prefill: Prefill
    cuda_graphs: bool
    page_size: int
    num_pages: int | None
    memory_fraction: float | None
    count_clipped: bool

    def __post_init__(self) -> None:
        check_choice("cache", self.cache, get_args(CacheMode))
        if self.backend is not None:
            check_choice("backend", self.backend, BACKENDS)
        check_choice("prefill", self.prefill, get_args(Prefill))
        check_switch("cuda_graphs", self.cuda_graphs)
        check_switch("count_clipped", self.count_clipped)
        check_integer("page_size", self.page_size, least=1)
        if not is_page_size(self.page_size):
            raise RequestError(
                f"page_size is {self.page_size}: give a power of two up to {MAX_PAGE_SIZE}"
            )
        if self.num_pages is not None:
            check_integer("num_pages", self.num_pages, least=1)
            if self.memory_fraction is not None:
                raise RequestError(
                    "num_pages and memory_fraction both size the cache: give one of them"
                )
        if not isinstance(self.fraction, int | float) or not 0 < self.fraction <= 1:
            raise RequestError(
                f"memory_fraction is {self.fraction!r}: give a number above 0, at most 1"
            )

    @property
    def fraction(self) -> float:
        """Of a GPU's memory that may be taken."""
        return MEMORY_FRACTION if self.memory_fraction is None else self.memory_fraction


@dataclass(frozen=True)
class BuiltRunner:
    """What runs a model, and its pages.

    Attributes:
        backend: the name of the attention backend.
        model: computes any batch.
        steps: computes the engine's steps, decode steps from CUDA graphs where that is possible.
        allocator: of the cache's pages.
        counters: of what the cache clips; None where nobody asked for it.
        held: gives the model back when it is closed.
    """

    backend: str
    model: ModelRunner
    steps: DecodeGraphs
    allocator: PageAllocator
    counters: CountingBackend | None
    held: ExitStack

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds."""
        return self.allocator.num_pages * self.allocator.page_size


def build_runner(loaded: LoadedModel, limits: EngineLimits, options: RunnerOptions) -> BuiltRunner:
    """Take over the model, and the memory of its cache.

    Where nobody says how many pages there are, they fill what ``options.fraction`` of a GPU leaves beside the weights
    and the largest step, which runs once to be measured.

    Raises:
        Fp8kvError: the model cannot be driven, the backend does not run on its device, or the memory is too small.
    """
    with ExitStack() as stack:
        builder = _Builder(loaded, limits, options)
        backend = builder.backend
        if backend.name == "triton" and loaded.dtype != torch.float32:
            fuse_modules(loaded.model, stack)
        num_pages = builder.count_pages() if options.num_pages is None else options.num_pages
        allocator = PageAllocator(num_pages, options.page_size)
        cache = builder.allocate(options.cache, num_pages)
        counters = CountingBackend(backend, cache.layers) if options.count_clipped else None
        model = stack.enter_context(builder.run(cache, counters or backend))
        capacity = num_pages * options.page_size
        steps = DecodeGraphs(
            model,
            max_sequences=limits.max_sequences,
            max_seq_len=min(capacity, limits.max_positions or capacity),
            enabled=options.cuda_graphs,
        )
        stack.callback(steps.close)
        return BuiltRunner(backend.name, model, steps, allocator, counters, stack.pop_all())


class _Builder:
    """The parts of a runner, for the cache that stays and for one that is there to be measured with."""

    def __init__(self, loaded: LoadedModel, limits: EngineLimits, options: RunnerOptions) -> None:
        self.backend = choose_backend(options.backend, loaded.device)
        self._loaded = loaded
        self._limits = limits
        self._options = options
        self._modules: dict[str, AttentionModule] = check_supported(loaded.model)
        # before anything runs through a model that others have changed
        check_free(loaded.model, self._modules)
        self._dims: dict[str, LayerDims] = measure_dims(loaded.model, self._modules)

    def count_pages(self) -> int:
        """Return how many pages there is room for."""
        device, page_size = self._loaded.device, self._options.page_size
        budget = CPU_CACHE_BYTES
        if device.type == "cuda":
            budget = read_memory(device, self._measure()).cache_bytes(self._options.fraction)
        page_bytes = bytes_per_token(self._dims, self._options.cache) * page_size
        return pages_that_fit(budget, page_bytes, page_size, self._limits, device)

    def allocate(self, mode: CacheMode, num_pages: int) -> PagedCache:
        """Return a cache of so many pages."""
        page_size, device = self._options.page_size, self._loaded.device
        try:
            return build_cache(
                self._modules,
                self._dims,
                mode=mode,
                num_pages=num_pages,
                page_size=page_size,
                device=device,
                scales=self._loaded.scales,
            )
        except torch.OutOfMemoryError:
            size = num_pages * page_size * bytes_per_token(self._dims, mode)
            raise RequestError(
                f"the cache's {num_pages} pages of {page_size} tokens take {size} bytes, more than {device} has left: "
                "lower num_pages"
            ) from None

    def run(self, cache: PagedCache, backend: Backend) -> ModelRunner:
        """Return the model over ``cache``."""
        return ModelRunner(self._loaded.model, cache, backend, prefill=self._options.prefill)

    def _measure(self) -> int:
        """Return the bytes that the largest step takes."""
        mode = _WITHOUT_SCALES.get(self._options.cache, self._options.cache)
        page_size = self._options.page_size
        cache = self.allocate(mode, pages_of_largest(self._limits, page_size))
        with self.run(cache, self.backend) as runner:
            return measure_activations(runner.forward, self._limits, page_size, self._loaded.device)
