"""A bound on the time of a whole request, its answer included."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sliceserve.server.responses import Answer, error_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_KIND = "RequestTimeoutError"


class Deadline:
    """ASGI layer that ends a request whose time is up.

    To the application it looks as if the client had left, which frees the request's place and its
    part of the KV cache. The client gets 408 or, in a stream, an error event.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and end it in time."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        end = asyncio.get_running_loop().time() + self._seconds
        answer = Answer(send)
        expired = False

        async def limited_receive() -> Message:
            nonlocal expired
            try:
                async with asyncio.timeout_at(end) as limit:
                    return await receive()
            except TimeoutError:
                expired = limit.expired() and not answer.ended
                return {"type": "http.disconnect"}

        async def limited_send(message: Message) -> None:
            if not expired:
                await answer.send(message)

        await self.app(scope, limited_receive, limited_send)
        if not expired:
            return
        text = f"The request was not answered within {self._seconds:g} s."
        if not answer.begun:
            # The same request would take as long again; the openai client respects this.
            headers = {"X-Should-Retry": "false"}
            await error_response(408, _KIND, text, headers)(scope, receive, send)
        else:
            await answer.end_stream(408, _KIND, text)
