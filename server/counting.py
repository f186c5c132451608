"""Counts every answer, those of our own layers included, which vLLM's counter does not see."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OTHER_ROUTE = "other"
DISCONNECTED = "disconnected"


class Counting:
    """Outermost ASGI layer: reports each HTTP request's route and status once it is over."""

    def __init__(
        self, app: ASGIApp, routes: frozenset[str], count: Callable[[str, str], None]
    ) -> None:
        """Wrap the application.

        Args:
            app: what answers.
            routes: the paths that are reported as they are; all others are `OTHER_ROUTE`, so that
                clients cannot invent series.
            count: takes the route, and the status or, if the client left before the end of its
                answer, `DISCONNECTED`.

        """
        self.app, self._routes, self._count = app, routes, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and report it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, ended, left = "500", False, False

        async def watched_receive() -> Message:
            nonlocal left
            message = await receive()
            # After the end of an answer this comes for every request.
            if message["type"] == "http.disconnect" and not ended:
                left = True
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = str(message["status"])
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                ended = True
            await send(message)

        try:
            await self.app(scope, watched_receive, watched_send)
        finally:
            route = scope["path"] if scope["path"] in self._routes else OTHER_ROUTE
            self._count(route, DISCONNECTED if left else status)
