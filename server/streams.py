"""Ends an answer's stream when its client leaves, without a task that waits for that.

Starlette's streams wait for the client's leaving in one task and send in another, unless the server
is one of ASGI's version 2.4, whose `send` fails once the client has left. A stream that waits for
its next token does not send, so here it is cancelled.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sliceserve.server.exchange import exchange_of
from sliceserve.server.responses import shared_answer

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from sliceserve.server.exchange import Exchange
    from sliceserve.server.responses import Answer

SENDING_FAILS = "2.4"
AGAIN_S = 0.1
_SCOPE_KEY = "sliceserve.left"


def leaving(scope: Any) -> asyncio.Future[bool] | None:
    """Return what is done when the client has left, or seems to; None where the server cannot say.

    Its result is whether the client itself has left.
    """
    found: asyncio.Future[bool] | None = scope.get(_SCOPE_KEY)
    return found


def share_leaving(scope: Any, left: asyncio.Future[bool]) -> None:
    """Have `leaving` return this."""
    scope[_SCOPE_KEY] = left


def has_left(left: asyncio.Future[bool], *, itself: bool) -> None:
    """Note, once, that the client has left; `itself` if it did not only seem so."""
    if not left.done():
        left.set_result(itself)


class _Stream:
    """An answer whose application `limit` cancels."""

    def __init__(self, answer: Answer, exchange: Exchange | None) -> None:
        self.limit = asyncio.timeout(None)
        self.over = False
        self._answer, self._exchange = answer, exchange

    def end(self, left: asyncio.Future[bool]) -> None:
        """Cancel the application as soon as its answer has begun, if it has not ended by then."""
        if self.over:
            return
        loop = asyncio.get_running_loop()
        if not self._answer.begun:
            loop.call_later(AGAIN_S, self.end, left)
            return
        if self._exchange is not None and left.result() and not self._answer.ended:
            self._exchange.disconnected = True
        self.limit.reschedule(loop.time())


class Streams:
    """ASGI layer that cancels the application if the client leaves after its answer has begun.

    Before that the application waits for the client itself. Where the server does not say that a
    client has left, nothing is changed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and end it with its client."""
        left = leaving(scope)
        if scope["type"] != "http" or left is None:
            await self.app(scope, receive, send)
            return
        # In the scope itself: the router leaves the route there, for the layers outside.
        scope["asgi"] = {**scope["asgi"], "spec_version": SENDING_FAILS}
        answer = shared_answer(scope, send)
        stream = _Stream(answer, exchange_of(scope))
        left.add_done_callback(stream.end)
        try:
            async with stream.limit:
                await self.app(scope, receive, answer.send)
        except TimeoutError:
            if not stream.limit.expired():
                raise
        finally:
            stream.over = True
            left.remove_done_callback(stream.end)
