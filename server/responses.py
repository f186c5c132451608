"""Answers that our layers give themselves, as OpenAI error objects or plain JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import Mapping

RETRY_AFTER_S = 5


def error_object(status: int, kind: str, message: str, param: str | None = None) -> dict[str, Any]:
    """Return an OpenAI error object, with the status as its code as in vLLM's errors.

    Args:
        status: of HTTP.
        kind: of the error, such as "BadRequestError".
        message: one or two sentences.
        param: the argument of the request that is at fault, if one is.

    """
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(
    status: int,
    kind: str,
    message: str,
    headers: Mapping[str, str] | None = None,
    param: str | None = None,
) -> JSONResponse:
    """Return an OpenAI error object as the answer to a request."""
    return JSONResponse(error_object(status, kind, message, param), status, headers)


def unavailable(message: str) -> JSONResponse:
    """Return a 503 that says when to try again, on a connection that ends with it.

    The connection ends because what answers the next request is another listener, or another
    server.
    """
    headers = {"Retry-After": str(RETRY_AFTER_S), "Connection": "close"}
    return error_response(503, "ServiceUnavailableError", message, headers)
