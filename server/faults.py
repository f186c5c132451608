"""What a client is told when the application fails: never a broken stream, never a traceback."""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from sliceserve.server.exchange import exchange_of
from sliceserve.server.responses import ERROR, error_response, shared_answer

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_logger = logging.getLogger("vllm.sliceserve.faults")
# What input can cause; templates raise the last.
STUMBLES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError,
    RecursionError, TypeError, ValueError, TemplateError,
)  # fmt: skip
_KIND = "InternalServerError"


class Faults:
    """ASGI layer that ends an answer which the application could not.

    vLLM's routes answer most errors themselves; what they raise within a stream would cut it off,
    and where vLLM stumbles over a request as it reads it, the request is at fault, unless the error
    is one of the machine, such as a lack of memory.
    """

    def __init__(self, app: ASGIApp, reading: tuple[str, ...] = ()) -> None:
        """Wrap the application; `reading` names the modules in which it reads requests."""
        self.app, self._reading = app, reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and end its answer if nobody else has."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = shared_answer(scope, send)
        answer.holds = True
        try:
            await self.app(scope, receive, answer.send)
        except Exception as error:
            exchange = exchange_of(scope)
            name = exchange.id if exchange is not None else "without an id"
            stumbled = self._stumbled(error)
            if stumbled:
                # Of the error the kind alone: its message may hold what the client wrote.
                trace = "".join(traceback.format_tb(error.__traceback__))
                kind = type(error).__name__
                _logger.warning("Request %s cannot be read: %s\n%s", name, kind, trace)
            else:
                _logger.exception("Request %s failed.", name)
            if answer.was_cut:
                return
            if stumbled and not answer.begun:
                text = "The request has an input that the model or this server cannot take."
                refusal = error_response(400, "BadRequestError", text)
                await refusal(scope, receive, answer.send_instead)
                return
            text = f"The request failed; the server's log says why of request {name}."
            if not answer.begun:
                await error_response(ERROR, _KIND, text)(scope, receive, answer.send_instead)
            elif not answer.ended and not await answer.end_stream(ERROR, _KIND, text):
                raise
            return
        if not answer.was_cut:
            for message in answer.held:
                await answer.send_instead(message)

    def _stumbled(self, error: Exception) -> bool:
        """Whether the error comes from where requests are read, or from what that calls."""
        if not isinstance(error, STUMBLES):
            return False
        modules = [
            frame.f_globals.get("__name__", "")
            for frame, _ in traceback.walk_tb(error.__traceback__)
        ]
        return any(module.startswith(self._reading) for module in modules)
