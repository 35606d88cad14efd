"""What the answers of both routes have in common: one JSON object, or a stream of them."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from typing import Any, ClassVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from fp8kv.recipes.errors import Fp8kvError
from fp8kv.runtime.requests import Choice, Output, join_outputs
from fp8kv.runtime.server.api_errors import ApiError, refuse
from fp8kv.runtime.server.connection import EventStream, unless_gone
from fp8kv.runtime.server.jobs import Work
from fp8kv.runtime.server.protocol import ChatRequest, CompletionRequest
from fp8kv.runtime.server.service import Service, Session


class Form(ABC):
    """How one request is put to the engine, and how its answer looks.

    Attributes:
        id_prefix: of the answer's id.
        whole_object: what an answer calls itself.
        chunk_object: what a part of a stream calls itself.
        service: of the server.
        session: of the request.
        num_prompts: each has ``n`` choices.
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    num_prompts = 1

    def __init__(self, service: Service, body: CompletionRequest | ChatRequest) -> None:
        self.service = service
        self.session: Session
        self._body = body
        self._id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0

    @abstractmethod
    def check(self) -> None:
        """Refuse what can be refused before anything is done.

        Raises:
            ApiError: the request asks for what does not go together.
            RequestError: a value is out of its range.
        """

    @abstractmethod
    async def read_work(self) -> Work:
        """Return what the engine is to do; the errors are those of :meth:`check`."""

    @abstractmethod
    def whole_choice(self, prompt: int, choice: Choice) -> dict[str, Any]:
        """Return a choice of an answer in one piece, without what both routes have."""

    @abstractmethod
    def first_parts(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield what a stream has before its first token, with the number of the choice."""

    @abstractmethod
    def part(self, prompt: int, choice: int, output: Output) -> dict[str, Any]:
        """Return what a stream has for one output, without what both routes have."""

    async def answer(self, request: Request) -> Response:
        """Return the answer to ``request``, whose body is this form's."""
        self.service.check_model(self._body.model)
        self._checked()
        self.session = self.service.open(self.num_prompts * self._body.num_choices)
        try:
            if self._body.stream:
                # what is refused is refused by its status, before the stream begins
                await unless_gone(request.receive, self._start())
                return EventStream(self._events(), self.session.close)
            answer = await unless_gone(request.receive, self._answer_whole())
        except BaseException:
            self.session.close()
            raise
        self.session.close()
        return JSONResponse(answer)

    def _checked(self) -> None:
        try:
            self.check()
        except Fp8kvError as error:
            raise refuse(str(error)) from None

    async def _start(self) -> Work:
        try:
            work = await self.read_work()
        except Fp8kvError as error:
            raise refuse(str(error)) from None
        self._num_prompt_tokens = sum(map(len, work.prompts))
        await self.session.start(work)
        return work

    async def _answer_whole(self) -> dict[str, Any]:
        work = await self._start()
        steps: defaultdict[tuple[int, int], list[Output]] = defaultdict(list)
        if work.parameters is not None:
            async for batch in self.session.outputs():
                for prompt, output in batch:
                    steps[prompt, output.index].append(output)
        choices = []
        for number in range(self.session.num_sequences):
            prompt, index = divmod(number, self._body.num_choices)
            own = steps[prompt, index]
            # nothing was generated where only scores were asked for
            choice = join_outputs(own) if own else Choice("", (), (), "length")
            self._num_generated_tokens += len(choice.token_ids)
            choices.append(
                {
                    "index": number,
                    **self.whole_choice(prompt, choice),
                    "finish_reason": choice.finish_reason,
                }
            )
        return {**self._head(self.whole_object), "choices": choices, "usage": self._usage()}

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            for number, part in self.first_parts():
                yield self._chunk(number, part, None)
            async for batch in self.session.outputs():
                yield b"".join(self._chunks(batch))
            if self._body.includes_usage:
                yield _event(
                    {**self._head(self.chunk_object), "choices": [], "usage": self._usage()}
                )
        except ApiError as error:
            yield _event(error.body)
        yield b"data: [DONE]\n\n"

    def _chunks(self, batch: list[tuple[int, Output]]) -> Iterator[bytes]:
        for prompt, output in batch:
            self._num_generated_tokens += len(output.token_ids)
            # half a character is nothing to tell
            if output.text or output.logprobs or output.finish_reason is not None:
                number = prompt * self._body.num_choices + output.index
                yield self._chunk(number, self.part(prompt, number, output), output.finish_reason)

    def _chunk(self, number: int, part: dict[str, Any], finish_reason: str | None) -> bytes:
        choice = {"index": number, **part, "finish_reason": finish_reason}
        usage = {"usage": None} if self._body.includes_usage else {}
        return _event({**self._head(self.chunk_object), "choices": [choice], **usage})

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.service.settings.model,
        }

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_generated_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_generated_tokens,
        }


def _event(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
