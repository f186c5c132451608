"""A bound on the time of a whole request, its answer included, which the server can draw in."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from sliceserve.server.responses import error_response, shared_answer, unavailable
from sliceserve.server.streams import has_left, leaving

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from sliceserve.server.responses import Answer

LAST_WORDS_S = 5.0


class _Limit:
    """The time of one request: what waits for its client is cancelled when it is up.

    `asyncio.timeout` around each wait would set a timer each, some four a request.

    Attributes:
        up: whether it is.
        expired: whether it was before the answer's end, of which no more is let through.
        over: whether the application has ended.

    """

    def __init__(self, answer: Answer, left: asyncio.Future[bool] | None) -> None:
        self.up = self.expired = self.over = False
        self._answer, self._left = answer, left
        self._waiting: set[asyncio.Task[object]] = set()

    def end(self) -> None:
        """Let nothing wait any more."""
        if not self.up:
            self.up = True
            for task in self._waiting:
                task.cancel()
            self._end_stream()

    def _end_stream(self) -> None:
        """End what does not wait for its client, because the server says when it leaves."""
        if self._left is None or self.over:
            return
        if self._answer.begun:
            self.cut()
        has_left(self._left, itself=False)

    def cut(self) -> None:
        """Let no more of the answer through, unless it has ended."""
        if not self._answer.ended:
            self.expired = True
            self._answer.cut()

    async def receive(self, receive: Receive) -> Message:
        """Return what comes from the client; once the time is up, that it has left."""
        message = await self._next(receive)
        if message is not None:
            return message
        self.cut()
        return {"type": "http.disconnect"}

    async def _next(self, receive: Receive) -> Message | None:
        task = asyncio.current_task()
        if self.up or task is None:
            return None
        before = task.cancelling()
        self._waiting.add(task)
        try:
            return await receive()
        except asyncio.CancelledError:
            # As `asyncio.timeout` does: others may have cancelled the task too.
            if not self.up or task.uncancel() > before:
                raise
            return None
        finally:
            self._waiting.discard(task)
            # A stream that has ended cancels this. The error then holds this frame, which would
            # hold the task, which holds the error: with the request, until a collection.
            del task


class Deadline:
    """ASGI layer that ends a request whose time is up, or all of them.

    To the application it looks as if the client had left, which frees the request's place and its
    part of the KV cache. The client gets 408, or 503 from a server that ends; in a stream, an error
    event.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app, self._seconds = app, seconds
        self._running: set[_Limit] = set()
        self._cut = False

    def cut(self) -> None:
        """End all requests now, those that are yet to come too."""
        self._cut = True
        for limit in self._running:
            limit.end()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and end it in time."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = shared_answer(scope, send)
        limit = _Limit(answer, leaving(scope))
        # Not at once: the application does not expect a client that leaves before its request.
        seconds = 0 if self._cut else self._seconds
        timer = asyncio.get_running_loop().call_later(seconds, limit.end)
        self._running.add(limit)
        try:
            await self.app(scope, partial(limit.receive, receive), answer.send)
        finally:
            limit.over = True
            self._running.discard(limit)
            timer.cancel()
        if limit.up:
            limit.cut()  # the application was cancelled before its answer began
        if not limit.expired:
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
