"""The engine: requests in, outputs step by step, over any ``forward(batch)``.

A step launches one forward pass. :mod:`fp8kv.runtime.scheduler` says what it computes; here its logits become tokens,
text and reasons to end. Text, stops and counters live on the host; nothing here knows a model or an attention kernel.

The device never waits for the host. A step launches a pass before it reads what the pass before has chosen::

    device   | pass 1              | pass 2                   | pass 3
    host     | launch 1 | launch 2 | read 1, text, launch 3   | read 2, text, launch 4 | ...

The chosen tokens go from pass to pass on the device, and ``max_tokens`` is a matter of counting. Only the end of
sequence and stop strings are found when the next pass runs already: what that pass says of the continuation is dropped.
Its pages can be given away meanwhile, because whoever gets them writes them in a later pass.
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
from fp8kv.runtime.outputs import News, make_output
from fp8kv.runtime.paging import PageAllocator
from fp8kv.runtime.requests import FinishReason, Output, Request, TokenLogprob
from fp8kv.runtime.sampling import PendingSample, Sampled, SamplingParameters, sample, upload
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


@dataclass(frozen=True)
class _Launched:
    """A forward pass whose tokens nobody has read."""

    ready: list[Continuation]  # who gets a token, in the order of the rows
    sampled: PendingSample


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
        self._launched: _Launched | None = None
        self._is_closed = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def has_work(self) -> bool:
        """Whether a request is there whose last output was not returned."""
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
        """Launch a forward pass and return what the one before added, or [] if it added nothing.

        If the forward pass raises, the step has not happened: nothing is lost, and the next one tries again.
        """
        before = self._launched
        self._launch()
        return [self._output(news) for news in self._read(before)]

    def cancel(self, request_id: int) -> bool:
        """Drop a request and free its pages; return whether it was there (it may have ended just before)."""
        continuations = self._requests.pop(request_id, [])
        for continuation in continuations:
            self._held_back.pop(continuation, None)
            self._scheduler.remove(continuation)
            self._live.pop(continuation, None)
        return bool(continuations)

    def close(self) -> None:
        """Drop all requests, let go of the model and take no more."""
        if self._is_closed:
            return
        for request_id in list(self._requests):
            self.cancel(request_id)
        self._is_closed = True
        self._launched = None
        # without requests there is no work for it, and it holds the cache
        del self._runner

    def _launch(self) -> None:
        """Start the next forward pass, if there is something to compute, and the choice of its tokens."""
        work = self._scheduler.schedule()
        if not work:
            self._launched = None
            return
        batch = make_batch(
            [
                (part.token_ids, part.continuation.num_cached, part.continuation.pages)
                for part in work
            ],
            self._allocator.page_size,
            self._device,
        )
        self._feed(batch, work)
        logits = self._runner.forward(batch)
        # whoever is cut short by the budget is the last
        ready = [part.continuation for part in work if part.is_last_chunk]
        launched = None
        if ready:
            sampled = sample(
                logits[: len(ready)].float(),
                [self._live[continuation].parameters for continuation in ready],
                [continuation.num_generated for continuation in ready],
            )
            launched = _Launched(ready, sampled)
        # nothing above has changed anything that counts, and nothing below raises
        self._launched = launched
        self._scheduler.advance(work)
        self._num_computed += sum(part.num_tokens for part in work)
        for continuation in ready:
            continuation.num_unread += 1
            most = self._live[continuation].parameters.max_tokens
            continuation.is_done = continuation.num_generated == most

    def _feed(self, batch: Batch, work: Sequence[Work]) -> None:
        """Put in the tokens that the pass before has chosen and nobody has read; they come first, one each."""
        before = self._launched
        rows = [row for row, part in enumerate(work) if part.continuation.num_unread]
        if before is None or not rows:
            return
        chosen = before.sampled.chosen
        fed = [work[row].continuation for row in rows]
        if fed == before.ready and rows[-1] == len(rows) - 1:
            batch.token_ids[: len(rows)] = chosen
            return
        place = {continuation: row for row, continuation in enumerate(before.ready)}
        sources = [place[continuation] for continuation in fed]
        target, source = upload([rows, sources], torch.int64, chosen.device)
        batch.token_ids[target] = chosen[source]

    def _read(self, launched: _Launched | None) -> list[News]:
        """Wait for a pass and add its tokens; who is gone meanwhile gets none."""
        if launched is None:
            return []
        sampled = launched.sampled.read()
        return [
            self._extend(sampled, row, continuation)
            for row, continuation in enumerate(launched.ready)
            if continuation in self._live
        ]

    def _extend(self, sampled: Sampled, row: int, continuation: Continuation) -> News:
        continuation.num_unread -= 1
        # their prompt's pages can be shared from now on
        self._scheduler.add_first(self._held_back.pop(continuation, []))
        token_id, logprob = sampled.token_ids[row], sampled.logprobs[row]
        if token_id is None:
            self._scheduler.discard(continuation)
            return News(continuation, None, (), "error")
        continuation.token_ids.append(token_id)
        self._num_generated += 1
        reason: FinishReason | None = None
        ignore_eos = self._live[continuation].parameters.ignore_eos
        if token_id in self._eos_token_ids and not ignore_eos:
            reason = "stop"
        elif continuation.is_done and not continuation.num_unread:
            reason = "length"
        if reason is not None:
            self._scheduler.remove(continuation)
        logprobs = () if logprob is None else (TokenLogprob(token_id, logprob, sampled.top[row]),)
        return News(continuation, token_id, logprobs, reason)

    def _output(self, news: News) -> Output:
        output = make_output(news, self._live[news.continuation].detokenizer)
        if output.finish_reason is not None:
            self._end(news.continuation)
        return output

    def _end(self, continuation: Continuation) -> None:
        self._scheduler.remove(continuation)
        del self._live[continuation]
        siblings = self._requests[continuation.request_id]
        siblings.remove(continuation)
        if not siblings:
            del self._requests[continuation.request_id]
