"""Leaving without dropping an answer: new requests are refused, running ones counted down."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sliceserve.server.exchange import (
    Outcome,
    Refusal,
    exchange_of,
    note_refusal,
    outcome_of,
)
from sliceserve.server.health import Lifecycle, Phase
from sliceserve.server.responses import unavailable
from sliceserve.server.status_page import STATUS

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Receive, Scope, Send

METRICS = "/metrics"
_WATCHED = (METRICS, STATUS)


class Drain:
    """ASGI layer that counts running requests and, while draining, answers new ones with 503.

    ``/metrics`` and the status are neither counted nor refused, so that a drain can be watched.
    """

    def __init__(
        self,
        app: ASGIApp,
        lifecycle: Lifecycle,
        cut: Callable[[], None],
        report: Callable[[Outcome], None] = lambda _outcome: None,
    ) -> None:
        """Wrap the application.

        Args:
            app: what answers.
            lifecycle: tells when the server begins to leave.
            cut: ends what runs in the application, in good order.
            report: takes how each request ended that was running then.

        """
        self.app, self._lifecycle, self.cut, self._report = app, lifecycle, cut, report
        self.running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan" or scope["path"] in _WATCHED:
            await self.app(scope, receive, send)
            return
        if self._lifecycle.phase is not Phase.SERVING:
            note_refusal(scope, Refusal.DRAINING)
            await unavailable("The server is shutting down; try again.")(scope, receive, send)
            return
        self.running += 1
        self._idle.clear()
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1
            exchange = exchange_of(scope)
            if self._lifecycle.phase is not Phase.SERVING and exchange is not None:
                self._report(outcome_of(exchange))
            if not self.running:
                self._idle.set()

    async def wait(self, timeout: float, *ends: asyncio.Event) -> int:
        """Wait until no request runs; returns how many still do.

        Args:
            timeout: seconds to wait at most.
            ends: each ends the wait when it is set.

        """
        waits = [asyncio.ensure_future(event.wait()) for event in (self._idle, *ends)]
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return self.running
