"""Requests that run through one engine side by side, each of whose askers gets its own outputs only."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.engine import Engine
from fp8kv.runtime.requests import Output, Request


class Streams:
    """Steps an engine as long as somebody waits for outputs, and sorts them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inboxes: dict[int, deque[Output]] = {}

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Output]]:
        """Yield the outputs of all requests with the request's number; whatever happens, none stays behind.

        Raises:
            RequestError: a request cannot be served.
            EvaluationError: a continuation failed; the others are cancelled.
        """
        inbox: deque[Output] = deque()
        numbers: dict[int, int] = {}
        num_unfinished = sum(request.parameters.n for request in requests)
        try:
            for number, request in enumerate(requests):
                request_id = self._engine.add(request)
                numbers[request_id] = number
                self._inboxes[request_id] = inbox
            while num_unfinished and (inbox or self._engine.has_work):
                if not inbox:
                    self._step()
                while inbox:
                    output = inbox.popleft()
                    number = numbers[output.request_id]
                    if output.error is not None:
                        raise EvaluationError(f"prompt {number} of {len(requests)}: {output.error}")
                    num_unfinished -= output.finish_reason is not None
                    yield number, output
        finally:
            for request_id in numbers:
                self._engine.cancel(request_id)
                del self._inboxes[request_id]

    def _step(self) -> None:
        # a step serves all that is there
        for output in self._engine.step():
            if output.request_id in self._inboxes:
                self._inboxes[output.request_id].append(output)
