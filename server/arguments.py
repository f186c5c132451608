"""What a request asks for, read from its body before vLLM reads it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sliceserve.server.bounds import Bounds, find_excess
from sliceserve.server.exchange import Refusal, exchange_of, note_refusal
from sliceserve.server.forms import compiled_form
from sliceserve.server.responses import error_response, shared_answer

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# vLLM says no more where the engine ended a request with an error, such as of a grammar.
_FAILED = b'"Internal server error"'
_NO_FORM = "{} has a form that cannot be compiled, or the request failed while it was followed."


class Arguments:
    """ASGI layer that notes the model a request asks for, and refuses one that asks too much.

    A 500 of a request whose form the engine compiles becomes a 400 where vLLM gives no reason.

    It stands within `Admission`, whose first message is the whole body. What is no JSON object
    is left to vLLM, which answers with an error of its own.
    """

    def __init__(self, app: ASGIApp, bounds: Bounds) -> None:
        self.app, self._bounds = app, bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with its body as it came, or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        pending: list[Message] = [await receive()]
        try:
            given = json_object(pending[0].get("body", b""))
        except RecursionError:
            await self._refuse("The body is nested too deep.", None, scope, receive, send)
            return
        model = given.get("model")
        if (exchange := exchange_of(scope)) is not None and isinstance(model, str):
            exchange.model = model
        excess = find_excess(given, self._bounds)
        if excess is not None:
            await self._refuse(excess.message, excess.argument, scope, receive, send)
            return

        async def replayed() -> Message:
            return pending.pop() if pending else await receive()

        answer = shared_answer(scope, send)
        await self.app(scope, replayed, send)
        if answer.held and _FAILED in answer.held[-1].get("body", b""):
            form = compiled_form(given)
            if form is not None:
                answer.held.clear()
                refusal = error_response(400, "BadRequestError", _NO_FORM.format(form), param=form)
                await refusal(scope, receive, answer.send_instead)

    async def _refuse(
        self, message: str, argument: str | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        note_refusal(scope, Refusal.ASKS_TOO_MUCH)
        refusal = error_response(400, "BadRequestError", message, param=argument)
        await refusal(scope, receive, send)


def json_object(body: bytes) -> dict[str, Any]:
    """Return the object that a body holds; an empty one for any other body.

    Raises RecursionError if it is nested too deep.
    """
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
