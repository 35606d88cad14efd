"""The engine: requests in, outputs step by step, over any ``forward(batch)``.

One step is one forward pass. :mod:`fp8kv.runtime.scheduler` says what it computes; here its logits become tokens,
text and reasons to end. Text, stops and counters live on the host; nothing here knows a model or an attention kernel.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.batch import Batch, make_batch
from fp8kv.runtime.detokenizer import Detokenizer
from fp8kv.runtime.limits import EngineLimits, EngineStatus
from fp8kv.runtime.paging import PageAllocator
from fp8kv.runtime.requests import FinishReason, Output, Request, TokenLogprob
from fp8kv.runtime.sampling import Sampled, SamplingParameters, sample
from fp8kv.runtime.scheduler import Continuation, Scheduler, Work


class Runner(Protocol):
    """A model over a paged cache."""

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits ``[sequences, vocab]`` of each sequence's last new token."""
        ...


@dataclass(eq=False)
class _Live:
    """What the engine keeps of a continuation beside its pages."""

    parameters: SamplingParameters
    detokenizer: Detokenizer


class Engine:
    """Continues prompts, many at a time.

    Not safe for threads: one thread adds, steps and cancels. What a continuation says depends on its own request
    only, not on what else runs: greedy and seeded outputs are the same alone and in any company, up to what the
    arithmetic of differently shaped batches differs by.

    Use as a context manager, or call :meth:`close`.
    """

    def __init__(
        self,
        runner: Runner,
        allocator: PageAllocator,
        tokenizer: Any,
        limits: EngineLimits,
        *,
        eos_token_ids: Collection[int],
        device: torch.device | str,
    ) -> None:
        self._runner = runner
        self._allocator = allocator
        self._tokenizer = tokenizer
        self._limits = limits
        self._eos_token_ids = frozenset(eos_token_ids)
        self._device = device
        self._scheduler = Scheduler(
            allocator,
            max_batch_tokens=limits.max_batch_tokens,
            max_sequences=limits.max_sequences,
        )
        self._live: dict[Continuation, _Live] = {}
        self._requests: dict[int, list[Continuation]] = {}
        self._held_back: dict[Continuation, list[Continuation]] = {}
        self._capacity = allocator.num_pages * allocator.page_size
        self._ids = count()
        self._num_computed = 0
        self._num_generated = 0
        self._is_closed = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests)

    @property
    def status(self) -> EngineStatus:
        """The present load, and the counters."""
        held_back = sum(len(siblings) for siblings in self._held_back.values())
        return EngineStatus(
            num_waiting=self._scheduler.num_waiting + held_back,
            num_running=self._scheduler.num_running,
            num_pages=self._allocator.num_pages,
            num_free_pages=self._allocator.num_free,
            num_preemptions=self._scheduler.num_preemptions,
            num_reused_tokens=self._scheduler.num_reused_tokens,
            num_computed_tokens=self._num_computed,
            num_generated_tokens=self._num_generated,
        )

    def add(self, request: Request) -> int:
        """Queue ``request`` and return its id, by which its outputs go.

        Where several continuations are asked for, the first computes the prompt and the others find its full
        pages in the cache.

        Raises:
            RequestError: the prompt is empty, holds a token id that the model does not know, or does not fit
                with its ``max_tokens``; ``n`` exceeds the engine's ``max_sequences``; or the engine is closed.
        """
        if self._is_closed:
            raise RequestError("the engine is closed: make a new one")
        parameters = request.parameters
        self._limits.check(request.prompt_token_ids, parameters.max_tokens, self._capacity)
        if parameters.n > self._limits.max_sequences:
            raise RequestError(
                f"n is {parameters.n}, and the engine continues {self._limits.max_sequences} at one time: "
                "lower n or raise max_sequences"
            )
        seed = secrets.randbits(32) if parameters.seed is None else parameters.seed
        request_id = next(self._ids)
        continuations = []
        for index in range(parameters.n):
            continuation = Continuation(
                request_id, index, list(request.prompt_token_ids), len(request.prompt_token_ids)
            )
            self._live[continuation] = _Live(
                dataclasses.replace(parameters, n=1, seed=seed + index),
                Detokenizer(self._tokenizer, parameters.stop),
            )
            continuations.append(continuation)
        self._requests[request_id] = continuations
        self._scheduler.add(continuations[0])
        if len(continuations) > 1:
            self._held_back[continuations[0]] = continuations[1:]
        return request_id

    def step(self) -> list[Output]:
        """Run one forward pass and return what it added, or [] if there was nothing to do or no prompt was done.

        If the forward pass or the choice of tokens raises, the step has not happened, and the next one tries again.
        """
        work = self._scheduler.schedule()
        if not work:
            return []
        logits = self._runner.forward(self._batch(work))
        # whoever is cut short by the budget is the last
        ready = [part.continuation for part in work if part.is_last_chunk]
        sampled = self._sample(logits[: len(ready)], ready)
        # nothing above has changed anything, and nothing below raises
        self._scheduler.advance(work)
        self._num_computed += sum(part.num_tokens for part in work)
        self._num_generated += len(ready)
        return [self._extend(sampled, row, one) for row, one in enumerate(ready)]

    def cancel(self, request_id: int) -> bool:
        """Drop a request and free its pages; return whether it was there (it may have ended just before)."""
        continuations = self._requests.pop(request_id, [])
        for continuation in continuations:
            self._held_back.pop(continuation, None)
            self._scheduler.remove(continuation)
            self._live.pop(continuation, None)
        return bool(continuations)

    def close(self) -> None:
        """Drop all requests and take no more."""
        for request_id in list(self._requests):
            self.cancel(request_id)
        self._is_closed = True

    def _batch(self, work: Sequence[Work]) -> Batch:
        return make_batch(
            [
                (part.token_ids, part.continuation.num_cached, part.continuation.pages)
                for part in work
            ],
            self._allocator.page_size,
            self._device,
        )

    def _sample(self, logits: Tensor, continuations: Sequence[Continuation]) -> Sampled:
        if not continuations:  # chunks only
            return Sampled([], [], [])
        return sample(
            logits.float(),
            [self._live[continuation].parameters for continuation in continuations],
            [continuation.num_generated for continuation in continuations],
        )

    def _extend(self, sampled: Sampled, row: int, continuation: Continuation) -> Output:
        token_id = sampled.token_ids[row]
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._live[continuation].parameters.logprobs is not None:
            logprobs = (TokenLogprob(token_id, sampled.logprobs[row], sampled.top[row]),)
        # their prompt's pages can be shared from now on
        self._scheduler.add_first(self._held_back.pop(continuation, []))
        continuation.token_ids.append(token_id)
        text, reason = self._extend_text(continuation, token_id)
        if reason is not None:
            self._end(continuation)
        return Output(
            continuation.request_id, continuation.index, (token_id,), text, logprobs, reason
        )

    def _extend_text(
        self, continuation: Continuation, token_id: int
    ) -> tuple[str, FinishReason | None]:
        live = self._live[continuation]
        if token_id in self._eos_token_ids and not live.parameters.ignore_eos:
            return live.detokenizer.finish(), "stop"
        text = live.detokenizer.append(token_id)
        if live.detokenizer.is_stopped:
            return text, "stop"
        if continuation.num_generated == live.parameters.max_tokens:
            text += live.detokenizer.finish()
            # what was held back may have been the rest of a stop string
            return text, "stop" if live.detokenizer.is_stopped else "length"
        return text, None

    def _end(self, continuation: Continuation) -> None:
        self._scheduler.remove(continuation)
        del self._live[continuation]
        siblings = self._requests[continuation.request_id]
        siblings.remove(continuation)
        if not siblings:
            del self._requests[continuation.request_id]
