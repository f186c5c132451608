"""What a request asks for, read from its body before vLLM reads it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sliceserve.server.bounds import Bounds, find_excess
from sliceserve.server.exchange import Refusal, exchange_of, note_refusal
from sliceserve.server.responses import error_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Arguments:
    """ASGI layer that notes the model a request asks for, and refuses one that asks too much.

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
        given = json_object(pending[0].get("body", b""))
        model = given.get("model")
        if (exchange := exchange_of(scope)) is not None and isinstance(model, str):
            exchange.model = model
        excess = find_excess(given, self._bounds)
        if excess is not None:
            note_refusal(scope, Refusal.ASKS_TOO_MUCH)
            refusal = error_response(400, "BadRequestError", excess.message, param=excess.argument)
            await refusal(scope, receive, send)
            return

        async def replayed() -> Message:
            return pending.pop() if pending else await receive()

        await self.app(scope, replayed, send)


def json_object(body: bytes) -> dict[str, Any]:
    """Return the object that a body holds; an empty one for any other body."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
