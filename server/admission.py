"""Bounds on what comes in: requests at a time, bytes of a body, seconds that a body may take."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from sliceserve.server.exchange import Refusal, note_refusal
from sliceserve.server.responses import error_response

if TYPE_CHECKING:
    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Reading costs the engine nothing, so these are always let in.
FREE_METHODS = ("GET", "HEAD", "OPTIONS")
RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Limits:
    """The bounds: requests at a time, bytes and seconds."""

    requests: int
    body_bytes: int
    body_seconds: float


class Admission:
    """ASGI layer that takes in a whole body within its bounds, then a request if there is room.

    A body is read before its request counts, so that slow senders take no room, but not while
    there is none. The application holds whole bodies anyway; answers pass through untouched.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self._limits = app, limits
        self._running = 0

    @property
    def running(self) -> int:
        """How many requests are let in and not over."""
        return self._running

    @property
    def full(self) -> bool:
        """Whether the next request would be refused."""
        return self._running >= self._limits.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan" or scope.get("method") in FREE_METHODS:
            await self.app(scope, receive, send)
            return
        if self.full:
            await self._refuse(scope, receive, send)
            return
        if scope["type"] == "http":
            body = await self._read(scope, receive)
            if body is None:
                return
            if not isinstance(body, bytes):
                await body(scope, receive, send)
                return
            receive = _replay(body, receive)
            if self.full:  # since it came
                await self._refuse(scope, receive, send)
                return
        self._running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._running -= 1

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"The server has {self._limits.requests} requests at work; try again."
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        note_refusal(scope, Refusal.FULL)
        await error_response(429, "RateLimitError", message, headers)(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | JSONResponse | None:
        """Return the body, or what to answer instead; None if the client left."""
        limit = self._limits.body_bytes
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            return _too_large(scope, limit)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        return _too_large(scope, limit)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            note_refusal(scope, Refusal.BODY_TOO_SLOW)
            text = f"The body did not arrive within {self._limits.body_seconds:g} s."
            return error_response(408, "RequestTimeoutError", text, {"Connection": "close"})


def _too_large(scope: Scope, limit: int) -> JSONResponse:
    note_refusal(scope, Refusal.BODY_TOO_LARGE)
    # The connection stays open: closing it under a sender would lose the answer.
    return error_response(413, "RequestTooLargeError", f"The body is larger than {limit} bytes.")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a receive that gives the body, and then what comes after it: the disconnect."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed
