"""What a client is told when the application fails: never a broken stream, never a traceback."""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from sliceserve.server import vllm_compat
from sliceserve.server.exchange import exchange_of
from sliceserve.server.responses import ERROR, error_response, shared_answer

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from sliceserve.server.exchange import Exchange

_logger = logging.getLogger("vllm.sliceserve.faults")
# What input can cause; templates raise the last.
STUMBLES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError,
    RecursionError, TypeError, ValueError, TemplateError,
)  # fmt: skip
_KIND = "InternalServerError"
# What Starlette raises in the place of an error that one of its handlers would have answered.
_TOO_LATE = "Caught handled exception, but response already started."


class Faults:
    """ASGI layer that ends an answer which the application could not.

    vLLM's routes answer most errors themselves; what they raise within a stream would cut it off.
    It ends with the status that vLLM's other routes give the same error, and its message if that is
    no 500. Where vLLM stumbles over a request as it reads it, the request is at fault, unless the
    error is one of the machine, such as a lack of memory.
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
        except Exception as raised:
            told = self._told(_cause(raised), exchange_of(scope))
            if answer.was_cut:
                return
            if not answer.begun:
                refusal = error_response(**told)
                await refusal(scope, receive, answer.send_instead)
            elif not answer.ended and not await answer.end_stream(**told):
                raise
            return
        if not answer.was_cut:
            for message in answer.held:
                await answer.send_instead(message)

    def _told(self, error: Exception, exchange: Exchange | None) -> dict[str, Any]:
        """Log an error, and return the arguments of the error object that the client gets."""
        name = exchange.id if exchange is not None else "without an id"
        found = vllm_compat.error_of(error)
        stumbled = found.code == ERROR and self._stumbled(error)
        if found.code >= ERROR and not stumbled:
            _logger.error("Request %s failed.", name, exc_info=error)
        else:
            # Of the error the kind alone: its message may hold what the client wrote.
            trace = "".join(traceback.format_tb(error.__traceback__))
            kind = type(error).__name__
            _logger.warning("Request %s cannot be read: %s\n%s", name, kind, trace)
        if stumbled:
            text = "The request has an input that the model or this server cannot take."
            return {"status": 400, "kind": "BadRequestError", "message": text}
        if found.code == ERROR:
            text = f"The request failed; the server's log says why of request {name}."
            return {"status": ERROR, "kind": _KIND, "message": text}
        # JSON can hold what UTF-8 cannot.
        text = found.message.encode("utf-8", "replace").decode()
        return {"status": found.code, "kind": found.type, "message": text, "param": found.param}

    def _stumbled(self, error: Exception) -> bool:
        """Whether the error comes from where requests are read, or from what that calls."""
        if not isinstance(error, STUMBLES):
            return False
        modules = [
            frame.f_globals.get("__name__", "")
            for frame, _ in traceback.walk_tb(error.__traceback__)
        ]
        return any(module.startswith(self._reading) for module in modules)


def _cause(error: Exception) -> Exception:
    """Return the error that came too late for its handler, or this one."""
    late = isinstance(error, RuntimeError) and str(error) == _TOO_LATE
    return error.__cause__ if late and isinstance(error.__cause__, Exception) else error
