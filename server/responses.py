"""Answers that our layers give themselves, as OpenAI error objects or plain JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from starlette.types import Message, Scope, Send

RETRY_AFTER_S = 5
EVENTS = "text/event-stream"
ERROR = 500
_SCOPE_KEY = "sliceserve.answer"


class Answer:
    """How far an answer has come, and an orderly end for a stream of events that cannot go on.

    All layers that want to know share one, so that a message passes through one function more.

    Attributes:
        ended: its last part has been sent.
        was_cut: nothing more of the application's is let through.
        holds: whether a 500 of the application's is held, which comes before the exception that
            says what it is about.
        held: that 500.

    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._open = False  # it has begun, and was not cut off
        self.ended = False
        self.was_cut = False
        self.holds = False
        self.held: list[Message] = []

    @property
    def begun(self) -> bool:
        """Whether its status has been sent."""
        return self._start is not None

    def send(self, message: Message) -> Awaitable[None]:
        """Stand in for the server's `send`; no coroutine, which would cost a frame a message."""
        return self._pass(message) if self._open else self._begin(message)

    def _begin(self, message: Message) -> Awaitable[None]:
        if self.was_cut:
            return nothing()
        if self.held or (self.holds and message.get("status") == ERROR):
            self.held.append(message)
            return nothing()
        return self.send_instead(message)

    def send_instead(self, message: Message) -> Awaitable[None]:
        """Send a layer's own message, whatever becomes of the application's."""
        if message["type"] != "http.response.start":
            return self._pass(message)
        self._start, self._open = message, not self.was_cut
        return self._send(message)

    def _pass(self, message: Message) -> Awaitable[None]:
        """Send a part of the answer's body."""
        if not message.get("more_body", False):
            self.ended = True
        return self._send(message)

    def cut(self) -> None:
        """Let nothing more of the application's through."""
        self._open, self.was_cut = False, True

    async def end_stream(
        self, status: int, kind: str, message: str, param: str | None = None
    ) -> bool:
        """End a stream of events with an error; False if there is none that is under way."""
        if self._start is None or self.ended:
            return False
        if not Headers(raw=self._start["headers"]).get("content-type", "").startswith(EVENTS):
            return False
        error = json.dumps(error_object(status, kind, message, param))
        event = f"data: {error}\n\ndata: [DONE]\n\n"
        await self._pass({"type": "http.response.body", "body": event.encode()})
        return True


def shared_answer(scope: Scope, send: Send) -> Answer:
    """Return the answer whose `send` this is, from then on in the scope; a new one if none is."""
    found: Answer | None = scope.get(_SCOPE_KEY)
    if found is None or found.send != send:
        found = Answer(send)
        share_answer(scope, found)
    return found


def share_answer(scope: Scope, answer: Answer) -> None:
    """Have the layers within find this answer, if its `send` reaches them."""
    scope[_SCOPE_KEY] = answer


async def nothing() -> None:
    """Send nothing, in the place of a message."""


def error_object(status: int, kind: str, message: str, param: str | None = None) -> dict[str, Any]:
    """Return an OpenAI error object, with the status as its code as in vLLM's errors.

    Args:
        status: of HTTP.
        kind: of the error, such as "BadRequestError".
        message: one or two sentences.
        param: the argument of the request that is at fault, if one is.

    """
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(
    status: int,
    kind: str,
    message: str,
    headers: Mapping[str, str] | None = None,
    param: str | None = None,
) -> JSONResponse:
    """Return an OpenAI error object as the answer to a request."""
    return JSONResponse(error_object(status, kind, message, param), status, headers)


def unavailable(message: str) -> JSONResponse:
    """Return a 503 that says when to try again, on a connection that ends with it.

    The connection ends because what answers the next request is another listener, or another
    server.
    """
    headers = {"Retry-After": str(RETRY_AFTER_S), "Connection": "close"}
    return error_response(503, "ServiceUnavailableError", message, headers)
