"""The one thread that touches the engine.

The event loop hands jobs over and gets events back; nothing is shared but an inbox of commands, and the loop is woken
once for all that a step gave. A job whose prompts are scored waits in line with the others, one prompt between two
steps, so that what is generated goes on meanwhile; where it lacks pages, the engine is let run until it has them, and
nobody overtakes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from fp8kv.recipes.errors import Fp8kvError, RequestError
from fp8kv.runtime.limits import EngineStatus
from fp8kv.runtime.requests import Request
from fp8kv.runtime.server.jobs import Accepted, EngineStopped, Event, Job, Scored, Step, Work
from fp8kv.runtime.server.prompt_scores import NotNow, score_prompt
from fp8kv.runtime.server.rate import Rate

if TYPE_CHECKING:
    from fp8kv.runtime.cache_counters import LayerCounts
    from fp8kv.runtime.llm import LLM

_LOGGER = logging.getLogger(__name__)


class EngineThread:
    """Runs the engine of an :class:`~fp8kv.runtime.llm.LLM` in a thread of its own.

    All methods are the event loop's. Once started it must be stopped.

    Attributes:
        status: the engine's, after its last step.
        stopped: why the engine takes no more; None while it does.
    """

    def __init__(self, llm: LLM) -> None:
        self.status: EngineStatus = llm.engine.status
        self.stopped: EngineStopped | None = None
        self._llm = llm
        self._engine = llm.engine
        self._rate = Rate()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fp8kv-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_counting = True
        self._is_stopping = False
        self._open: set[Job] = set()
        self._asked: set[asyncio.Future[Mapping[str, LayerCounts]]] = set()
        # what is above is the loop's, what follows is the thread's
        self._line: deque[Job] = deque()
        self._running: dict[int, tuple[Job, int]] = {}
        self._outbox: list[tuple[Job, Event]] = []

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated in the last seconds, by the second."""
        return self._rate.per_second(time.monotonic())

    def start(self) -> None:
        """Begin to step, and tell the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End what is running, with :class:`EngineStopped`, and wait for the thread."""
        self._is_stopping = True
        self._inbox.put(_wake)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def submit(self, work: Work) -> Job:
        """Hand ``work`` over; :meth:`withdraw` the job in the end, whatever came of it.

        Raises:
            EngineStopped: the engine takes no more.
        """
        if self.stopped is not None:
            raise self.stopped
        job = Job(work)
        self._open.add(job)
        self._inbox.put(partial(self._line.append, job))
        return job

    def withdraw(self, job: Job) -> None:
        """Forget ``job``; what of it is still under way ends, and its pages are free."""
        if job in self._open:
            self._open.remove(job)
            self._inbox.put(partial(self._drop, job))

    async def cache_counts(self) -> Mapping[str, LayerCounts]:
        """Return how many values were clipped and flushed, by layer; {} where nobody counts or the engine stopped."""
        if self.stopped is not None or self._loop is None or not self._is_counting:
            return {}
        found: asyncio.Future[Mapping[str, LayerCounts]] = self._loop.create_future()
        self._asked.add(found)
        self._inbox.put(partial(self._count, found))
        try:
            return await found
        finally:
            self._asked.discard(found)

    def _run(self) -> None:
        stopped = EngineStopped("the server is shutting down", is_failure=False)
        try:
            while not self._is_stopping:
                self._obey()
                self._admit()
                self._post()  # a step may be long, and who is refused or let in need not wait for it
                self._step()
                self._post()
            for request_id in self._running:
                self._engine.cancel(request_id)
        except Exception as error:
            _LOGGER.exception("the engine failed")
            stopped = EngineStopped(f"the engine failed: {error}", is_failure=True)
        self._tell(partial(self._end, stopped))

    def _obey(self) -> None:
        """Do what the inbox says; wait for it where there is nothing else to do."""
        is_idle = not (self._engine.has_work or self._line)
        try:
            while True:
                self._inbox.get(block=is_idle)()
                is_idle = False
        except Empty:
            pass

    def _admit(self) -> None:
        """Hand the engine what is in line; of the prompts that are to be scored, one."""
        while self._line:
            job = self._line[0]
            try:
                if job.work.num_alternatives is not None and job.num_scored < len(job.work.prompts):
                    self._score(job, job.work.num_alternatives)
                    return
                self._add(job)
            except NotNow:
                if not self._engine.has_work:
                    raise  # nobody holds the pages that are missing
                return
            except Fp8kvError as error:
                self._drop(job)
                self._outbox.append((job, error))
            else:
                self._line.popleft()

    def _score(self, job: Job, num_alternatives: int) -> None:
        prompt = job.num_scored
        entries = score_prompt(self._llm, job.work.prompts[prompt], num_alternatives)
        job.num_scored += 1
        self._outbox.append((job, Scored(prompt, entries)))

    def _add(self, job: Job) -> None:
        if job.work.parameters is not None:
            for index, prompt in enumerate(job.work.prompts):
                request_id = self._engine.add(Request(prompt, job.work.parameters))
                self._running[request_id] = (job, index)
                job.request_ids.append(request_id)
        self._outbox.append((job, Accepted()))

    def _step(self) -> None:
        for output in self._engine.step() if self._engine.has_work else ():
            # what was cancelled may have had a step under way
            if output.request_id in self._running:
                job, prompt = self._running[output.request_id]
                self._outbox.append((job, Step(prompt, output)))
        self.status = self._engine.status
        self._rate.note(time.monotonic(), self.status.num_generated_tokens)

    def _drop(self, job: Job) -> None:
        if job in self._line:
            self._line.remove(job)
        while job.request_ids:
            request_id = job.request_ids.pop()
            self._engine.cancel(request_id)
            del self._running[request_id]

    def _count(self, found: asyncio.Future[Mapping[str, LayerCounts]]) -> None:
        try:
            counts = self._llm.cache_counts()
        except RequestError:  # nobody counts, so nobody need ask again
            self._is_counting, counts = False, {}
        self._tell(partial(_resolve, found, counts))

    def _post(self) -> None:
        if self._outbox:
            self._tell(partial(_deliver, self._outbox))
            self._outbox = []

    def _tell(self, what: Callable[[], None]) -> None:
        """Have the event loop do something; where it is closed, nobody waits for it any more."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(what)

    def _end(self, stopped: EngineStopped) -> None:
        """Tell all who wait; the loop's."""
        self.stopped = stopped
        for job in self._open:
            job.events.put_nowait(stopped)
        for found in self._asked:
            _resolve(found, {})


def _wake() -> None:
    """Do nothing, for a thread that waits for something to do."""


def _deliver(outbox: Sequence[tuple[Job, Event]]) -> None:
    for job, event in outbox:
        job.events.put_nowait(event)


def _resolve(
    found: asyncio.Future[Mapping[str, LayerCounts]], counts: Mapping[str, LayerCounts]
) -> None:
    if not found.done():
        found.set_result(counts)
