"""A bound on the time of a whole request, its answer included, which the server can draw in."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from sliceserve.server.responses import error_response, shared_answer, unavailable

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from sliceserve.server.responses import Answer

LAST_WORDS_S = 5.0


class Deadline:
    """ASGI layer that ends a request whose time is up, or all of them.

    To the application it looks as if the client had left, which frees the request's place and its
    part of the KV cache. The client gets 408, or 503 from a server that ends; in a stream, an error
    event.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app, self._seconds = app, seconds
        self._waiting: set[asyncio.Timeout] = set()
        self._cut = False

    def cut(self) -> None:
        """End all requests now, those that are yet to come too."""
        self._cut = True
        for limit in self._waiting:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and end it in time."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        end = asyncio.get_running_loop().time() + self._seconds
        answer = shared_answer(scope, send)
        expired = False

        async def limited_receive() -> Message:
            nonlocal expired
            limit = asyncio.timeout_at(0 if self._cut else end)
            try:
                async with limit:
                    self._waiting.add(limit)
                    try:
                        return await receive()
                    finally:
                        self._waiting.discard(limit)
            except TimeoutError:
                expired = limit.expired() and not answer.ended
                if expired:
                    answer.cut()
                return {"type": "http.disconnect"}
            finally:
                # A stream that has ended cancels this. The error then holds this frame, which
                # would hold the task, which holds the error: with the request, until a collection.
                del limit

        await self.app(scope, limited_receive, answer.send)
        if not expired:
            return
        # A client that reads nothing must not keep the request's place.
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._end(answer, scope, receive)

    async def _end(self, answer: Answer, scope: Scope, receive: Receive) -> None:
        if self._cut:
            status, kind = 503, "ServiceUnavailableError"
            text = "The server is shutting down, and the request was not answered in time."
            refusal = unavailable(text)
        else:
            status, kind = 408, "RequestTimeoutError"
            text = f"The request was not answered within {self._seconds:g} s."
            # The same request would take as long again; the openai client respects this.
            refusal = error_response(status, kind, text, {"X-Should-Retry": "false"})
        if answer.begun:
            await answer.end_stream(status, kind, text)
        else:
            await refusal(scope, receive, answer.send_instead)
