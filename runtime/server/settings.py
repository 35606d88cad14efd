"""What a server is told."""

from __future__ import annotations

from dataclasses import dataclass

from fp8kv.recipes.errors import RequestError

MAX_QUEUE = 1024
MAX_BODY_BYTES = 16 << 20
SHUTDOWN_SECONDS = 30.0


@dataclass(frozen=True)
class ServerSettings:
    """What a server is told.

    Attributes:
        model: the name under which clients ask for it.
        api_key: that clients must show; None lets everybody in.
        max_queue: sequences that may wait beside those that the engine continues at one time.
        max_body_bytes: of a request.
        shutdown_seconds: that running requests have to end when the server is told to stop.
    """

    model: str
    api_key: str | None = None
    max_queue: int = MAX_QUEUE
    max_body_bytes: int = MAX_BODY_BYTES
    shutdown_seconds: float = SHUTDOWN_SECONDS

    def __post_init__(self) -> None:
        for name, least in (("max_queue", 0), ("max_body_bytes", 1), ("shutdown_seconds", 0)):
            if not getattr(self, name) >= least:
                raise RequestError(f"{name} is {getattr(self, name)}: give at least {least}")
        if self.api_key == "":
            raise RequestError("the API key is empty: give one, or none at all")
