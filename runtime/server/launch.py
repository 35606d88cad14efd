"""From an :class:`~fp8kv.runtime.llm.LLM` to a server that runs until it is told to stop."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.server.app import make_app
from fp8kv.runtime.server.service import Service
from fp8kv.runtime.server.settings import ServerSettings

if TYPE_CHECKING:
    from fp8kv.runtime.llm import LLM

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_CLOSING_SECONDS = 5
"""For connections to close once everything is answered, or cut short."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has the address and does not listen yet, so that nobody waits while the model loads.

    Raises:
        RequestError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
        except OSError:
            opened.close()
            raise
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from None
    return opened


def is_loopback(opened: socket.socket) -> bool:
    """Return whether only this machine reaches ``opened``."""
    return ipaddress.ip_address(opened.getsockname()[0]).is_loopback


def url(opened: socket.socket) -> str:
    """Return the address of ``opened`` as clients write it."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    llm: LLM,
    settings: ServerSettings,
    opened: socket.socket,
    *,
    say: Callable[[str], None],
    started: str,
) -> int:
    """Serve until SIGINT or SIGTERM, then finish what runs; a second SIGINT finishes nothing.

    Args:
        llm: belongs to the server meanwhile.
        settings: of the server.
        opened: of :func:`bind`.
        say: takes a line for the user.
        started: the line that is said when requests are taken.

    Returns:
        The requests that were cut short at the end.

    Raises:
        RequestError: somebody else listens by now.
    """
    try:
        opened.listen()
    except OSError as error:
        host, port = opened.getsockname()[:2]
        raise _cannot_listen(host, port, error) from None
    server = DrainingServer(Service(llm, settings), say=say, started=started)
    server.run(sockets=[opened])
    return server.num_cut_short


class DrainingServer(uvicorn.Server):
    """Uvicorn, which on a signal goes on to listen, and says 503, until what runs has ended.

    Attributes:
        num_cut_short: requests that had not ended in time.
    """

    def __init__(self, service: Service, *, say: Callable[[str], None], started: str) -> None:
        config = uvicorn.Config(
            make_app(service),
            log_level="warning",
            access_log=False,
            server_header=False,
            # nobody in front is trusted to name the client, and nobody asks for it
            proxy_headers=False,
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=_CLOSING_SECONDS,
        )
        super().__init__(config)
        self.num_cut_short = 0
        self._service = service
        self._say = say
        self._started_line = started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the server runs; Uvicorn would raise them again at the end, as if that had failed.

        Only the main thread gets signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        self._say(self._started_line)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what runs, or cut it short when the time is up; then close."""
        if self._service.num_open:
            seconds = self._service.settings.shutdown_seconds
            self._say(
                f"stopping: {self._service.num_open} requests have {seconds:g} seconds to end"
            )
        self.num_cut_short = await self._service.drain(lambda: self.force_exit)
        # tells those who are left that they are cut short
        await self._service.stop()
        await super().shutdown(sockets)
        if self.force_exit:
            # Uvicorn would leave the lifespan to be cancelled, which is logged with a traceback
            await self.lifespan.shutdown()


def _cannot_listen(host: str, port: int, error: Exception) -> RequestError:
    return RequestError(
        f"cannot listen on {host} port {port}: {error}; choose another --host or --port"
    )
