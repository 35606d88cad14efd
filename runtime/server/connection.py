"""The client's end: a body that comes in, a stream that goes out, a connection that may be gone at any time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from fp8kv.runtime.server.api_errors import ApiError, ClientGone

_Result = TypeVar("_Result")

BODY_SECONDS = 60.0
"""In which a body must be here."""

STALL_SECONDS = 60.0
"""After which a client that reads nothing of its stream is dropped."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body of ``request``.

    Raises:
        ApiError: it is not declared as JSON, is too large, or comes too slowly.
        ClientGone: it does not come to its end.
    """
    # a page in a browser may send other types to any server, this machine's too, without asking first
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or "content-encoding" in request.headers:
        raise ApiError(
            415,
            "the body is not declared as JSON: send it with Content-Type: application/json, and not compressed",
            code="unsupported_media_type",
        )
    try:
        return await asyncio.wait_for(_receive_body(request, max_bytes), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"the body was not here after {BODY_SECONDS:.0f} seconds", code="body_too_slow"
        ) from None


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return what ``work`` returns; cancel it when the client closes the connection.

    Args:
        receive: of a request whose body has been read.
        work: to do.

    Raises:
        ClientGone: the client closed the connection.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_wait_until_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        # both have ended when this returns, so that nothing of them runs beside what comes next
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(StreamingResponse):
    """Server-sent events, until they end or the client is gone; then ``close`` is called, whatever happened."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, as ASGI has it."""
        try:
            await unless_gone(receive, self.stream_response(partial(_send_in_time, send)))
        except ClientGone:
            pass  # there is nobody to tell
        finally:
            self._close()


async def _receive_body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    num_bytes = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        num_bytes += len(message.get("body", b""))
        if num_bytes <= max_bytes:
            body += message.get("body", b"")
        # a client that is still sending would not see the answer; one that never ends need not
        elif num_bytes > 2 * max_bytes or not message.get("more_body", False):
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body has more than {max_bytes} bytes: send fewer prompts at once",
        code="body_too_large",
        headers={"Connection": "close"},
    )


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_in_time(send: Callable[[Message], Awaitable[None]], message: Message) -> None:
    try:
        await asyncio.wait_for(send(message), STALL_SECONDS)
    except asyncio.TimeoutError:
        raise ClientGone from None
