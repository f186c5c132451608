"""Bounds on the head of a request: who sends it has shown no key yet, and may be anybody."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from sliceserve.server.responses import error_response
from sliceserve.server.streams import has_left, leaving, share_leaving

if TYPE_CHECKING:
    from uvicorn.config import Config

HEAD_S = 30.0  # more than any client needs for what fits a few packets
REST_S = 60.0  # for what is left of a body once its request is answered: as a body has by default
# In the place of the defaults of vLLM's options of this meaning, 4 MiB and 256.
HEAD_BYTES = 64 * 2**10  # as most servers and proxies take at most
HEADERS = 128  # clients send about 10, and proxies add as many
HEAD_STATUSES = (400, 408, 431)  # of refusals


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds on a request's head, which it holds whole in memory.

    A head has to be complete HEAD_S seconds after the connection is made, or after the first byte
    that comes when all is answered; until that byte, uvicorn's own time for idle connections holds.
    A head or trailers of more bytes or headers than the configuration has for h11 get 431. The
    packet in which another request ends and a head begins does not count for that head.

    A refusal is an OpenAI error object. It ends the connection, after the answers to requests that
    came before it. The configuration's `refused_head`, if it has one, is told the status of each
    refusal of what has not become a request. Each request's scope says when its client has left
    (`server.streams`), of one whose answer waits for another's too.
    """

    def __init__(self, config: Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._most_bytes = config.h11_max_incomplete_event_size or HEAD_BYTES
        self._most_headers = getattr(config, "h11_max_header_count", HEADERS)
        self._refused_head = getattr(config, "refused_head", None)
        self._clock: asyncio.TimerHandle | None = None
        # Bytes since the last packet in which a head was complete, a body came or a request ended.
        self._size = 0
        self._in_body = False
        self._over = False
        # Of requests that are not answered yet, the oldest first; uvicorn keeps the newest.
        self._unanswered: deque[RequestResponseCycle] = deque()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the first head its time."""
        super().connection_made(transport)
        self._clock = self.loop.call_later(HEAD_S, self._on_time)

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave no timer behind, and tell the requests."""
        self._stop_clock()
        super().connection_lost(exc)
        self._tell_unanswered()
        # uvicorn leaves this one if the client broke the connection off, and with it the request,
        # for as long as idle connections are kept.
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Read on, unless that is over, and refuse a head that has become too large."""
        if self._over:
            return
        self._size += len(data)
        super().data_received(data)
        if self._over:
            return
        if self._size > self._most_bytes or len(self.headers or ()) > self._most_headers:
            self._refuse_size()
        elif self.cycle is not None and self.cycle.response_complete:
            self._time_what_comes()

    def on_headers_complete(self) -> None:
        """Begin the request, unless its head is too large.

        Raises:
            httptools.HttpParserError: it is, and has been refused; this stops the parser.

        """
        self._stop_clock()
        size = len(self.url) + sum(map(len, chain.from_iterable(self.headers)))
        if size > self._most_bytes or len(self.headers) > self._most_headers:
            self._refuse_size()
            raise httptools.HttpParserError
        share_leaving(self.scope, self.loop.create_future())
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:  # it is no WebSocket
            self._unanswered.append(self.cycle)
        self._size, self._in_body = 0, True

    def on_body(self, body: bytes) -> None:
        """Count anew: bodies have their own bounds, trailers these."""
        self._size = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Count anew for the next head."""
        self._size, self._in_body = 0, False
        self._stop_clock()
        super().on_message_complete()
        if not self.pipeline:
            # Of a connection that is not read, nobody would know that its client has left.
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Tell a request that is answered no more."""
        if self._unanswered:
            self._unanswered.popleft()
        super().on_response_complete()

    def handle_websocket_upgrade(self) -> None:
        """Leave the connection to the other protocol."""
        self._over = True
        self._tell_unanswered()  # this protocol hears of the connection no more
        super().handle_websocket_upgrade()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; called too when `on_headers_complete` has refused a head."""
        if not self._over:
            self._refuse(400, "BadRequestError", msg)

    def _tell_unanswered(self) -> None:
        """Tell the requests that are not answered yet that their client has left."""
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
            if (left := leaving(cycle.scope)) is not None:
                has_left(left, itself=True)
        self._unanswered.clear()

    def _time_what_comes(self) -> None:
        """Give what has begun to come its time, after an answer; else the connection is idle."""
        if self._size or self._in_body:
            if self._clock is None:
                seconds = REST_S if self._in_body else HEAD_S
                self._clock = self.loop.call_later(seconds, self._on_time)
        elif self.timeout_keep_alive_task is None:
            # uvicorn has stopped it at the rest of a body, and starts it with an answer only.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _on_time(self) -> None:
        if self._in_body or not self._size:
            self._over = True
            self.transport.close()
        else:
            text = f"The head of the request did not arrive within {HEAD_S:g} s."
            self._refuse(408, "RequestTimeoutError", text)

    def _refuse_size(self) -> None:
        text = (
            f"The head of the request has more than {self._most_bytes} bytes "
            f"or {self._most_headers} headers."
        )
        self._refuse(431, "RequestTooLargeError", text)

    def _refuse(self, status: int, kind: str, text: str) -> None:
        """Answer with an error and end the connection; what comes after it is ignored."""
        self._over = True
        self._stop_clock()
        if self._refused_head is not None and not self._in_body:
            self._refused_head(status)
        owed = self.cycle is not None and not self.cycle.response_complete
        if owed and (self.pipeline or not self._in_body):
            self.cycle.keep_alive = False  # ends the connection with the last answer
            return
        if not owed or not self.cycle.response_started:
            answer = error_response(status, kind, text, {"Connection": "close"})
            headers = (*self.server_state.default_headers, *answer.raw_headers)
            lines = (b"%b: %b\r\n" % header for header in headers)
            self.transport.write(
                b"".join((STATUS_LINE[status], *lines, b"\r\n", bytes(answer.body)))
            )
        self.transport.close()
