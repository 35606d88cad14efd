"""Errors that a client gets, in the shape of OpenAI's API.

The status says whose turn it is: 400 the body is no JSON, 401 the key is wrong, 404 no such model or path, 408 the body
came too slowly, 413 it is too large, 415 it is not declared as JSON, 422 it asks for what cannot be done, 429 the queue
is full, 500 this request failed, 503 the server takes no requests now or any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

RETRY_AFTER = {"Retry-After": "1"}
"""For what may go well in a moment."""


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        message: one sentence.
        code: a word that programs can tell the error by.
        param: the parameter at fault, where it is one.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What is sent: as JSON, or as the last event but one of a stream."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": "rate_limit_error" if self.status == 429 else kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def to_response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body, self.status, self.headers)


class ClientGone(Exception):
    """Nobody is there to answer: the connection was closed, or nothing is read from it."""


def refuse(message: str, param: str | None = None) -> ApiError:
    """Return the error for a body that is JSON and asks for what cannot be done."""
    return ApiError(422, message, code="invalid_value", param=param)


def from_validation(error: ValidationError) -> ApiError:
    """Return the error for a body that ``error`` found fault with; the first fault is the one that is told."""
    first = error.errors(include_url=False, include_input=False)[0]
    # a union's places end with the name of the type that was tried
    names = [str(part) for part in first["loc"]]
    param = ".".join(names) or None
    if first["type"] == "json_invalid":
        return ApiError(
            400,
            f"the body is no JSON in UTF-8: {first['ctx']['error']}",
            code="invalid_json",
        )
    if first["type"] == "extra_forbidden":
        return ApiError(
            422,
            f"{param} is no parameter of this server: leave it out",
            code="unknown_parameter",
            param=param,
        )
    if first["type"] == "unsupported":
        return ApiError(
            422, first["msg"], code="unsupported_parameter", param=first["ctx"]["parameter"]
        )
    if first["type"] == "missing":
        return ApiError(422, f"{param} is missing", code="missing_parameter", param=param)
    message = first["msg"] if param is None else f"{param}: {first['msg']}"
    return refuse(message, param)


def install_handlers(app: FastAPI) -> None:
    """Let every error of ``app`` be answered in the one shape."""
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientGone, _answer_nobody)
    app.add_exception_handler(Exception, _answer_bug)


def _answer_api_error(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, ApiError):
        raise error
    return error.to_response()


def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return ApiError(error.status_code, message, code=code, headers=error.headers).to_response()


def _answer_nobody(_request: Request, _error: Exception) -> JSONResponse:
    # 499, as nginx counts them; it is seen in the metrics only
    return JSONResponse(None, 499)


def _answer_bug(_request: Request, _error: Exception) -> JSONResponse:
    # the traceback is logged where the exception arrives next, at the server
    return ApiError(
        500, "an error of this server; its log says more", code="internal_error"
    ).to_response()
