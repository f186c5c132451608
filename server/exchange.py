"""Watches every request and its answer, those that our own layers refuse included."""

from __future__ import annotations

import json
import random
import re
import time
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import TYPE_CHECKING

from sliceserve.server.responses import Answer, share_answer
from sliceserve.server.usage import begin_work, end_work, work_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OTHER_ROUTE = "other"
REQUEST_ID = "X-Request-ID"
_REQUEST_ID = REQUEST_ID.lower().encode()
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SCOPE_KEY = "sliceserve.exchange"
_KEY_NAME = "sliceserve.key"
# Of vLLM's routes and of our layers.
_ERROR_EVENTS = (b'data: {"error"', b"event: error\n")


class Refusal(StrEnum):
    """Why a request with a valid key was refused before the engine had it; a label's values."""

    FULL = "full"
    DRAINING = "draining"
    BODY_TOO_LARGE = "body_too_large"
    BODY_TOO_SLOW = "body_too_slow"
    ASKS_TOO_MUCH = "asks_too_much"
    QUEUED_TOKENS = "queued_tokens"
    KEY_FULL = "key_full"
    KEY_REQUESTS = "key_requests_per_minute"
    KEY_TOKENS = "key_tokens_per_minute"


class Outcome(StrEnum):
    """How a request ended that was running when the server began to leave; a label's values."""

    FINISHED = "finished"
    CUT = "cut"
    LEFT = "left"


@dataclass
class Exchange:
    """A request and its answer, filled in by the layers that it passes.

    Attributes:
        id: the client's `X-Request-ID`, or one that was made.
        method: the HTTP method.
        time: of arrival, in seconds since 1970.
        route: the template of the route, or `OTHER_ROUTE`.
        key: the name of the key that opened the server, never the key.
        model: what the client asked for, as it is.
        status: None if no answer began.
        failed: the status that an answer would have had which failed after it began.
        refused: None if the engine was asked, or would have been.
        disconnected: the client left before the end of the answer.
        prompt_tokens: None if the engine was not asked, or keeps no statistics.
        generation_tokens: the same.
        seconds: from arrival to the end.
        first_byte_seconds: from arrival to the first byte of the answer's body.
        chunks: of the answer's body.

    """

    id: str
    method: str
    time: float
    route: str = OTHER_ROUTE
    key: str | None = None
    model: str | None = None
    status: int | None = None
    failed: int | None = None
    refused: Refusal | None = None
    disconnected: bool = False
    prompt_tokens: int | None = None
    generation_tokens: int | None = None
    seconds: float = 0.0
    first_byte_seconds: float | None = None
    chunks: int = 0

    @property
    def tokens(self) -> int:
        """Of prompt and answer; one a chunk where the engine does not say."""
        if self.prompt_tokens is None or self.generation_tokens is None:
            return self.chunks
        return self.prompt_tokens + self.generation_tokens


def outcome_of(exchange: Exchange) -> Outcome:
    """Return how it ended: cut is what has an error of the server's for an answer, or in it."""
    if exchange.disconnected:
        return Outcome.LEFT
    status = exchange.failed or exchange.status or HTTPStatus.INTERNAL_SERVER_ERROR
    return Outcome.CUT if status >= HTTPStatus.INTERNAL_SERVER_ERROR else Outcome.FINISHED


def exchange_of(scope: Scope) -> Exchange | None:
    """Return the exchange that a layer within `Watch` may fill in."""
    found: Exchange | None = scope.get(_SCOPE_KEY)
    return found


def note_key(scope: Scope, name: str) -> None:
    """Note the name of the key that opened the server, for a WebSocket too."""
    scope[_KEY_NAME] = name
    if (exchange := exchange_of(scope)) is not None:
        exchange.key = name


def key_of(scope: Scope) -> str | None:
    """Return the name of the key that opened the server; None where there are no keys."""
    found: str | None = scope.get(_KEY_NAME)
    return found


def note_refusal(scope: Scope, reason: Refusal) -> None:
    """Note why the request is refused; one outside `Watch`, such as a WebSocket, is not noted."""
    if (exchange := exchange_of(scope)) is not None:
        exchange.refused = reason


class _NotedAnswer(Answer):
    """An answer whose parts are noted on its exchange.

    Attributes:
        began: when its request came, in seconds of a clock that only goes forward.

    """

    def __init__(self, send: Send, exchange: Exchange) -> None:
        super().__init__(send)
        self._exchange = exchange
        self.began = time.monotonic()

    def send_instead(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self._exchange.status = message["status"]
            message["headers"] = _named(message.get("headers", ()), self._exchange.id)
        return super().send_instead(message)

    def _pass(self, message: Message) -> Awaitable[None]:
        exchange = self._exchange
        if not exchange.chunks:
            exchange.first_byte_seconds = time.monotonic() - self.began
        exchange.chunks += 1
        if not message.get("more_body", False):
            self.ended = True
        if message.get("body", b"").startswith(_ERROR_EVENTS):
            exchange.failed = _code_of(message["body"])
        return self._send(message)


class Watch:
    """Outermost ASGI layer: names each HTTP request, and reports it once it is over.

    The name replaces the request's header, from which vLLM makes the ids of its requests, and is
    a header of the answer.
    """

    def __init__(
        self, app: ASGIApp, routes: frozenset[str], *report: Callable[[Exchange], None]
    ) -> None:
        """Wrap the application.

        Args:
            app: what answers.
            routes: the templates that are reported as they are; all others are `OTHER_ROUTE`, so
                that clients cannot invent series.
            report: each takes the exchange.

        """
        self.app, self._routes, self._report = app, routes, report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and report it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(_request_id(scope), scope["method"], time.time())
        inner = {**scope, "state": dict(scope.get("state", {})), _SCOPE_KEY: exchange}
        inner["headers"] = _named(scope["headers"], exchange.id)
        answer = _NotedAnswer(send, exchange)
        share_answer(inner, answer)

        async def watched_receive() -> Message:
            message = await receive()
            # After the end of an answer this comes for every request.
            if message["type"] == "http.disconnect" and not answer.ended:
                exchange.disconnected = True
            return message

        work = begin_work(inner)
        try:
            await self.app(inner, watched_receive, answer.send)
        finally:
            end_work(work)
            if exchange.status is None and not exchange.disconnected:
                exchange.status = 500  # what the HTTP server answers to an exception
            exchange.seconds = time.monotonic() - answer.began
            exchange.route = route_of(inner, self._routes)
            take_usage(exchange, inner)
            for report in self._report:
                report(exchange)


def route_of(scope: Scope, routes: frozenset[str]) -> str:
    """Return the template of the route that a request took, `OTHER_ROUTE` if it is not of these."""
    # Set by the router, where the request came so far.
    path = getattr(scope.get("route"), "path", scope["path"])
    return path if path in routes else OTHER_ROUTE


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == _REQUEST_ID), b"")
    text = given.decode("latin-1")
    # No secret: without asking the system for randomness.
    return text if _SANE_ID.fullmatch(text) else f"{random.getrandbits(128):032x}"


def _named(headers: Iterable[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    """Return the headers with this id in the place of any other."""
    named = [header for header in headers if header[0].lower() != _REQUEST_ID]
    named.append((_REQUEST_ID, request_id.encode()))
    return named


def take_usage(exchange: Exchange, scope: Scope) -> None:
    """Take the tokens of a request: vLLM's usage where its route leaves it, else the engine's."""
    usage = getattr(scope["state"].get("request_metadata"), "final_usage_info", None)
    if usage is not None:
        exchange.prompt_tokens = usage.prompt_tokens
        exchange.generation_tokens = usage.completion_tokens
    elif (tokens := work_of(scope).tokens()) is not None:
        exchange.prompt_tokens, exchange.generation_tokens = tokens


def _code_of(event: bytes) -> int:
    """Return the status in an event that tells of an error."""
    data = event.partition(b"data: ")[2].split(b"\n", 1)[0]
    try:
        return int(json.loads(data)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return 500
