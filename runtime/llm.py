"""A checkpoint, ready to generate: the model, its paged cache, its tokenizer and the engine in one object."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.modeling.load import load_model, load_tokenizer
from fp8kv.calibrate.modeling.placement import resolve_device, resolve_dtype
from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.architectures import check_supported
from fp8kv.runtime.backends import choose_backend
from fp8kv.runtime.cache_scales import read_scales
from fp8kv.runtime.engine import Engine
from fp8kv.runtime.generation import eos_token_ids, max_positions
from fp8kv.runtime.limits import MAX_BATCH_TOKENS, MAX_SEQUENCES, EngineLimits
from fp8kv.runtime.model_runner import ModelRunner
from fp8kv.runtime.paged_cache import (
    CacheMode,
    LayerDims,
    build_cache,
    bytes_per_token,
    measure_dims,
)
from fp8kv.runtime.paging import PageAllocator
from fp8kv.runtime.requests import Completion, Output, Request, join_outputs
from fp8kv.runtime.sampling import SamplingParameters
from fp8kv.runtime.scoring import score_tokens

Prompt = str | Sequence[int]
"""A text, or the token ids of one."""

PAGE_SIZE = 64
MEMORY_FRACTION = 0.9
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_CPU_CACHE_BYTES = 1 << 30


class LLM:
    """Generates with a checkpoint of Hugging Face's format, its KV cache held as asked.

    Use as a context manager, or call :meth:`close`. Not safe for threads.

    Attributes:
        engine: for requests that come and go one by one; who steps it himself calls none of the methods below
            meanwhile, which would take his outputs.
        tokenizer: of transformers.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        cache: CacheMode = "fp8",
        backend: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        page_size: int = PAGE_SIZE,
        num_pages: int | None = None,
        memory_fraction: float | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        max_sequences: int = MAX_SEQUENCES,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the weights and take the memory of the cache.

        Args:
            path: a directory or a hub id.
            cache: ``fp8`` with the checkpoint's scales, ``fp8-unit``, ``bf16``, ``emulate`` or ``float32``.
            backend: ``reference`` or ``triton``; None takes the fastest that runs on the device.
            dtype: of weights and arithmetic: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
            device: ``auto`` or a torch device.
            page_size: tokens of a cache page, a power of two.
            num_pages: of the cache; None takes what the memory gives.
            memory_fraction: of a GPU's memory that weights and cache may take together, 0.9 by default; the rest is
                for activations. On a CPU the cache takes 1 GiB at most.
            max_batch_tokens: tokens of a forward pass; longer prompts are computed in chunks.
            max_sequences: continuations that are generated at one time.
            revision: of a hub id.
            trust_remote_code: let the checkpoint run Python code of its own.

        Raises:
            Fp8kvError: a subclass that says what is wrong with the checkpoint, the model or the settings.
        """
        if dtype not in _DTYPES:
            raise RequestError(f"dtype is {dtype!r}: give one of {', '.join(_DTYPES)}")
        if num_pages is not None and memory_fraction is not None:
            raise RequestError(
                "num_pages and memory_fraction both size the cache: give one of them"
            )
        place = resolve_device(device)
        attention = choose_backend(backend, place)
        checkpoint = open_checkpoint(path, revision)
        self.tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        model = load_model(
            checkpoint,
            dtype=resolve_dtype(dtype, checkpoint, place),
            device=place,
            trust_remote_code=trust_remote_code,
        )
        modules = check_supported(model)
        dims = measure_dims(model, modules)
        limits = EngineLimits(
            vocab_size=_vocab_size(model),
            max_positions=max_positions(model),
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
        )
        if num_pages is None:
            fraction = MEMORY_FRACTION if memory_fraction is None else memory_fraction
            num_pages = _pages_that_fit(dims, cache, page_size, limits, place, fraction)
        self._allocator = PageAllocator(num_pages, page_size)
        self._limits = limits
        self._device = place
        self._runner = ModelRunner(
            model,
            build_cache(
                modules,
                dims,
                mode=cache,
                num_pages=num_pages,
                page_size=page_size,
                device=place,
                scales=read_scales(checkpoint),
            ),
            attention,
        )
        self.engine = Engine(
            self._runner,
            self._allocator,
            self.tokenizer,
            limits,
            eos_token_ids=eos_token_ids(model, self.tokenizer),
            device=place,
        )
        self._inboxes: dict[int, deque[Output]] = {}

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop all requests; the object generates no more."""
        self.engine.close()
        self._runner.close()

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the token ids of a prompt, with the special tokens that the tokenizer puts around a text."""
        return tuple(self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)

    def generate(
        self,
        prompts: Sequence[Prompt],
        parameters: SamplingParameters | Sequence[SamplingParameters],
    ) -> list[Completion]:
        """Continue every prompt; return in the order of ``prompts``.

        Args:
            prompts: texts or token ids.
            parameters: one for all, or one for each prompt.

        Raises:
            RequestError: a prompt does not fit, or there are more or fewer parameters than prompts.
        """
        encoded = self._encode_all(prompts)
        if isinstance(parameters, SamplingParameters):
            parameters = [parameters] * len(encoded)
        if len(parameters) != len(encoded):
            raise RequestError(
                f"{len(encoded)} prompts have {len(parameters)} parameters: give one for each, or one for all"
            )
        requests = [Request(*pair) for pair in zip(encoded, parameters, strict=True)]
        steps: list[list[list[Output]]] = [
            [[] for _ in range(request.parameters.n)] for request in requests
        ]
        for number, output in self._run(requests):
            steps[number][output.index].append(output)
        return [
            Completion(request.prompt_token_ids, tuple(join_outputs(one) for one in own))
            for request, own in zip(requests, steps, strict=True)
        ]

    def stream(self, prompt: Prompt, parameters: SamplingParameters) -> Iterator[Output]:
        """Continue one prompt and yield every token as it comes; who stops listening cancels it.

        Raises:
            RequestError: the prompt does not fit.
        """
        for _, output in self._run([Request(self.encode(prompt), parameters)]):
            yield output

    def logprobs(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Return for every prompt the natural log-probability of each token but the first, given those before it.

        Raises:
            RequestError: a prompt is empty or does not fit.
        """
        encoded = self._encode_all(prompts)
        capacity = self._allocator.num_pages * self._allocator.page_size
        for token_ids in encoded:
            self._limits.check(token_ids, 0, capacity)
        return [
            score_tokens(
                self._runner,
                self._allocator,
                token_ids,
                max_batch_tokens=self._limits.max_batch_tokens,
                device=self._device,
            )
            for token_ids in encoded
        ]

    def _encode_all(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        if isinstance(prompts, str):
            raise RequestError("prompts is one text: give a list of them")
        return [self.encode(prompt) for prompt in prompts]

    def _run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Output]]:
        """Yield the outputs of all requests with the request's number; whatever happens, none stays behind."""
        inbox: deque[Output] = deque()
        numbers: dict[int, int] = {}
        num_unfinished = sum(request.parameters.n for request in requests)
        try:
            for number, request in enumerate(requests):
                request_id = self.engine.add(request)
                numbers[request_id] = number
                self._inboxes[request_id] = inbox
            while num_unfinished and (inbox or self.engine.has_work):
                if not inbox:
                    self._step()
                while inbox:
                    output = inbox.popleft()
                    num_unfinished -= output.finish_reason is not None
                    yield numbers[output.request_id], output
        finally:
            for request_id in numbers:
                self.engine.cancel(request_id)
                del self._inboxes[request_id]

    def _step(self) -> None:
        # a step serves all that is there, other streams of this object, too
        for output in self.engine.step():
            if output.request_id in self._inboxes:
                self._inboxes[output.request_id].append(output)


def _pages_that_fit(
    dims: Mapping[str, LayerDims],
    mode: CacheMode,
    page_size: int,
    limits: EngineLimits,
    device: torch.device,
    fraction: float,
) -> int:
    """Return the pages for the memory that is left, no more than all seats at full length can fill."""
    if not 0 < fraction <= 1:
        raise RequestError(f"memory_fraction is {fraction}: give a number above 0, at most 1")
    budget = _CPU_CACHE_BYTES
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(total * fraction) - (total - free)
    page_bytes = bytes_per_token(dims, mode) * page_size
    num_pages = budget // page_bytes
    if num_pages < 1:
        raise RequestError(
            f"{fraction:.0%} of the memory of {device} leaves no room for one cache page of {page_bytes} bytes: "
            "raise memory_fraction or use a larger GPU"
        )
    if limits.max_positions is None:
        return num_pages
    return min(num_pages, limits.max_sequences * -(-limits.max_positions // page_size))


def _vocab_size(model: nn.Module) -> int:
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.num_embeddings)
