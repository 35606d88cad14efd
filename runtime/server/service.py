"""Requests on their way through the server: who is let in, and what of them runs where.

Everything here is the event loop's. Texts become tokens in a second thread, one request at a time, because a long one
takes longer than others should wait for their next token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from fp8kv.recipes.errors import EvaluationError, Fp8kvError
from fp8kv.runtime.requests import Output, TokenLogprob
from fp8kv.runtime.server.api_errors import RETRY_AFTER, ApiError, refuse
from fp8kv.runtime.server.engine_thread import EngineThread
from fp8kv.runtime.server.jobs import Accepted, EngineStopped, Event, Job, Scored, Step, Work
from fp8kv.runtime.server.logprobs import TokenNames
from fp8kv.runtime.server.metrics import Metrics
from fp8kv.runtime.server.settings import ServerSettings

if TYPE_CHECKING:
    from fp8kv.runtime.llm import LLM

_Result = TypeVar("_Result")

_POLL_SECONDS = 0.05


class Service:
    """What the routes share.

    Attributes:
        llm: the checkpoint; its engine is the engine thread's.
        settings: as given.
        engine: its thread.
        metrics: counters.
        names: of tokens.
        created: seconds since the epoch.
        is_draining: whether new requests are turned away.
    """

    def __init__(self, llm: LLM, settings: ServerSettings) -> None:
        self.llm = llm
        self.settings = settings
        self.engine = EngineThread(llm)
        self.metrics = Metrics()
        self.names = TokenNames(llm.tokenizer)
        self.created = int(time.time())
        self.is_draining = False
        self._sessions: set[Session] = set()
        self._num_seats = llm.limits.max_sequences + settings.max_queue
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="fp8kv-tokenizer")

    @property
    def num_open(self) -> int:
        """Requests that are not answered yet."""
        return len(self._sessions)

    @property
    def state(self) -> str:
        """``ok``, ``draining`` or ``failed``."""
        if self.engine.stopped is not None and self.engine.stopped.is_failure:
            return "failed"
        return "draining" if self.is_draining or self.engine.stopped is not None else "ok"

    def start(self) -> None:
        """Begin to serve."""
        self.engine.start()

    async def stop(self) -> None:
        """End what is running, and wait until it has."""
        self.is_draining = True
        await self.engine.stop()
        self._tokenizing.shutdown(cancel_futures=True)

    async def drain(self, is_urgent: Callable[[], bool]) -> int:
        """Take no more, wait for what runs as long as the settings say, and return how many requests are left.

        Args:
            is_urgent: whether to wait no longer.
        """
        self.is_draining = True
        end = time.monotonic() + self.settings.shutdown_seconds
        while self._sessions and time.monotonic() < end and not is_urgent():
            await asyncio.sleep(_POLL_SECONDS)
        return self.num_open

    def check_model(self, model: str) -> None:
        """Refuse a name under which nothing is served.

        Raises:
            ApiError: 404.
        """
        if model != self.settings.model:
            raise ApiError(
                404,
                f"the model {model!r} is not served here: ask for {self.settings.model!r}",
                code="model_not_found",
                param="model",
            )

    def open(self, num_sequences: int) -> Session:
        """Let a request in that will generate so many sequences; close what is returned, whatever comes of it.

        Raises:
            ApiError: there is no room now (429), or there will never be (422), or the server stops (503).
        """
        if self.engine.stopped is not None:
            raise _unavailable(str(self.engine.stopped))
        if self.is_draining:
            raise _unavailable("the server is shutting down")
        if num_sequences > self._num_seats:
            raise refuse(
                f"the request asks for {num_sequences} sequences, and the server holds {self._num_seats}: "
                "send fewer prompts at once"
            )
        taken = sum(session.num_sequences for session in self._sessions)
        if taken + num_sequences > self._num_seats:
            raise ApiError(
                429,
                f"{taken} sequences run or wait, of at most {self._num_seats}: try again later",
                code="queue_full",
                headers=RETRY_AFTER,
            )
        session = Session(self, num_sequences, self._sessions.discard)
        self._sessions.add(session)
        return session

    async def tokenize(self, function: Callable[[], _Result]) -> _Result:
        """Run ``function``, which uses the tokenizer, in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function)


class Session:
    """One request that was let in.

    Attributes:
        num_sequences: that it takes up.
        scores: of the prompts, where they were asked for; whole from :meth:`start` on.
    """

    def __init__(
        self, service: Service, num_sequences: int, forget: Callable[[Session], None]
    ) -> None:
        self.num_sequences = num_sequences
        self.scores: dict[int, tuple[TokenLogprob, ...]] = {}
        self._service = service
        self._forget = forget
        self._job: Job | None = None
        self._arrival = time.monotonic()
        self._has_output = False

    async def start(self, work: Work) -> None:
        """Hand ``work`` to the engine, and return when it has been accepted.

        Raises:
            ApiError: it can never run, or the engine stopped.
        """
        try:
            self._job = self._service.engine.submit(work)
        except EngineStopped as error:
            raise _unavailable(str(error)) from None
        while not isinstance(event := _checked(await self._job.events.get()), Accepted):
            if isinstance(event, Scored):
                self.scores[event.prompt] = event.entries

    async def outputs(self) -> AsyncIterator[list[tuple[int, Output]]]:
        """Yield what the steps add, as pairs of the prompt's number and an output, until all sequences have ended.

        What came while nobody asked comes at once.

        Raises:
            ApiError: a sequence failed, or the engine did.
        """
        if self._job is None:
            raise ValueError("the session was not started, or is closed")
        events = self._job.events
        num_unfinished = self.num_sequences
        while num_unfinished:
            found = [_step(await events.get())]
            while not events.empty():
                found.append(_step(events.get_nowait()))
            num_unfinished -= sum(step.output.finish_reason is not None for step in found)
            if not self._has_output:
                self._has_output = True
                elapsed = time.monotonic() - self._arrival
                self._service.metrics.first_token_seconds.observe(elapsed)
            yield [(step.prompt, step.output) for step in found]

    def close(self) -> None:
        """Give the pages and the place back; closing twice does nothing."""
        self._forget(self)
        if self._job is not None:
            self._service.engine.withdraw(self._job)
            self._job = None


def _checked(event: Event) -> Scored | Accepted | Step:
    """Return ``event``, or raise what a client is told of the exception that it is."""
    if isinstance(event, EngineStopped):
        if event.is_failure:
            raise ApiError(500, str(event), code="engine_failed")
        raise _unavailable(str(event))
    if isinstance(event, EvaluationError):
        raise ApiError(500, str(event), code="generation_failed")
    if isinstance(event, Fp8kvError):
        raise refuse(str(event))
    if isinstance(event, Exception):
        raise event
    return event


def _step(event: Event) -> Step:
    step = _checked(event)
    if not isinstance(step, Step):
        raise TypeError(f"{step} came after the engine had accepted everything")
    if step.output.finish_reason == "error":
        raise ApiError(500, str(step.output.error), code="generation_failed")
    return step


def _unavailable(message: str) -> ApiError:
    return ApiError(503, message, code="unavailable", headers=RETRY_AFTER)
