"""Answers that our layers give themselves, as OpenAI error objects or plain JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import Mapping

RETRY_AFTER_S = 5


def error_response(
    status: int, kind: str, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return an OpenAI error object, with the status as its code as in vLLM's errors."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers)


def unavailable(message: str) -> JSONResponse:
    """Return a 503 that says when to try again, on a connection that ends with it.

    The connection ends because what answers the next request is another listener, or another
    server.
    """
    headers = {"Retry-After": str(RETRY_AFTER_S), "Connection": "close"}
    return error_response(503, "ServiceUnavailableError", message, headers)
