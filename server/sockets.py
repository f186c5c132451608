"""A bound on the time that a WebSocket is open, which the server can draw in."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from sliceserve.server.deadline import LAST_WORDS_S
from sliceserve.server.responses import error_response, unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Of RFC 6455 and its registry.
POLICY_VIOLATION = 1008
SERVICE_RESTART = 1012
_OVER = ("websocket.close", "websocket.http.response.start", "websocket.disconnect")


class SocketDeadline:
    """ASGI layer that ends a WebSocket whose time is up, or all of them.

    The application is cancelled. The client gets a close frame with 1008, or 1012 from a server
    that ends; before the application has accepted it, 408 or 503.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app, self._seconds = app, seconds
        self._open: set[asyncio.Timeout] = set()
        self._cut = False

    def cut(self) -> None:
        """End all WebSockets now, those that are yet to come too."""
        self._cut = True
        for limit in self._open:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on, and end it in time if it is a WebSocket."""
        bounded = scope["type"] == "websocket"
        return (self._bounded if bounded else self.app)(scope, receive, send)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        accepted = over = False

        def note(message: Message) -> Message:
            nonlocal accepted, over
            accepted |= message["type"] == "websocket.accept"
            over |= message["type"] in _OVER
            return message

        async def noted_receive() -> Message:
            return note(await receive())

        async def noted_send(message: Message) -> None:
            await send(note(message))

        limit = asyncio.timeout(0 if self._cut else self._seconds)
        try:
            async with limit:
                self._open.add(limit)
                try:
                    await self.app(scope, noted_receive, noted_send)
                finally:
                    self._open.discard(limit)
        except TimeoutError:
            if not limit.expired():
                raise
        if not limit.expired() or over:
            return
        # Who reads nothing must not keep the place.
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._end(accepted, scope, receive, send)

    async def _end(self, accepted: bool, scope: Scope, receive: Receive, send: Send) -> None:
        if self._cut:
            code, text = SERVICE_RESTART, "The server is shutting down."
            refusal = unavailable(text)
        else:
            code, text = POLICY_VIOLATION, f"The WebSocket was open for {self._seconds:g} s."
            refusal = error_response(408, "RequestTimeoutError", text)
        if accepted:
            await send({"type": "websocket.close", "code": code, "reason": text})
        else:
            await refusal(scope, receive, send)
