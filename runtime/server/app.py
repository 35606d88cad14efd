"""The routes, and what stands before them: the key, and the count of what was answered."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fp8kv.runtime.server.api_errors import ApiError, from_validation, install_handlers
from fp8kv.runtime.server.chat import ChatForm
from fp8kv.runtime.server.completions import CompletionForm
from fp8kv.runtime.server.connection import read_body
from fp8kv.runtime.server.protocol import ChatRequest, CompletionRequest
from fp8kv.runtime.server.service import Service
from fp8kv.runtime.server.strict_model import StrictModel

if TYPE_CHECKING:
    from fp8kv.runtime.server.metrics import Metrics

_Body = TypeVar("_Body", bound=StrictModel)

_HEALTH = "/health"


def make_app(service: Service) -> FastAPI:
    """Return the application; its lifespan starts and stops ``service``."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    # no pages of documentation: they would load scripts from elsewhere
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    install_handlers(app)
    app.add_middleware(_Gate, key=service.settings.api_key, metrics=service.metrics)
    max_bytes = service.settings.max_body_bytes

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        body = await _read(request, CompletionRequest, max_bytes)
        return await CompletionForm(service, body).answer(request)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await _read(request, ChatRequest, max_bytes)
        return await ChatForm(service, body).answer(request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    # a hub id has a slash
    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service)

    @app.get(_HEALTH)
    async def health() -> JSONResponse:
        return JSONResponse({"status": service.state}, 200 if service.state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        page = service.metrics.page(
            service.engine.status,
            num_open=service.num_open,
            tokens_per_second=service.engine.tokens_per_second,
            cache_counts=await service.engine.cache_counts(),
        )
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    return app


class _Gate:
    """Lets in who has the key, and counts the answers.

    Everything but ``/health`` asks for the key, and what does not exist, too: nothing is to be learnt without it.
    """

    def __init__(self, app: ASGIApp, key: str | None, metrics: Metrics) -> None:
        self._app = app
        self._expected = None if key is None else f"Bearer {key}".encode()
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(scope, message["status"])
            await send(message)

        if not self._is_let_in(scope):
            await _wrong_key().to_response()(scope, receive, send_and_count)
            return
        try:
            await self._app(scope, receive, send_and_count)
        except Exception:
            # a bug is answered further out
            self._count(scope, 500)
            raise

    def _is_let_in(self, scope: Scope) -> bool:
        if self._expected is None or scope["path"] == _HEALTH:
            return True
        shown = Headers(scope=scope).get("authorization", "").encode("latin-1")
        return hmac.compare_digest(shown, self._expected)

    def _count(self, scope: Scope, status: int) -> None:
        # the route's own path: what clients make up would be a new row each
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route, str(status)).inc()


async def _read(request: Request, kind: type[_Body], max_bytes: int) -> _Body:
    """Return the body of ``request``; by hand, because a framework would read it before it counts the bytes."""
    text = await read_body(request, max_bytes)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise from_validation(error) from None


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.model,
        "object": "model",
        "created": service.created,
        "owned_by": "fp8kv",
        "max_model_len": service.llm.max_length,
    }


def _wrong_key() -> ApiError:
    return ApiError(
        401,
        "the API key is missing or wrong: send Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
