"""A bound on the prompt tokens that wait for the engine; over it 429, before an answer begins."""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sliceserve.server.admission import FREE_METHODS, RETRY_AFTER_S
from sliceserve.server.exchange import Refusal, note_refusal
from sliceserve.server.responses import error_response

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass
class Asking:
    """What one HTTP request asks of the engine.

    Attributes:
        promised: tokens that the engine will get but does not have yet, by vLLM's request id.
        asked: the engine was asked for something.
        committed: its answer has begun, or the engine works for it.
        refused: it gets 429, whatever the application answers.
        over: what still comes of it, in the background, is not waited for.

    """

    promised: Counter[str] = field(default_factory=Counter)
    asked: bool = False
    committed: bool = False
    refused: bool = False
    over: bool = False


# vLLM's routes do not tell its engine which HTTP request they ask for; tasks inherit this.
_asking: ContextVar[Asking | None] = ContextVar("sliceserve.asking", default=None)


class TokenQueue:
    """Counts the tokens of prompts that have no first token yet: those of each of `n` answers.

    A request has to have room for all its prompts at once, but one that waits alone always has
    room, else a long one never would.
    """

    def __init__(self, limit: int, in_engine: Callable[[], int]) -> None:
        """Take the most tokens that may wait, and what counts those that the engine has."""
        self.limit, self._in_engine = limit, in_engine
        self._promised = 0

    @property
    def tokens(self) -> int:
        """How many wait now."""
        return self._promised + self._in_engine()

    @property
    def full(self) -> bool:
        """Whether every further request would be refused."""
        return self.tokens >= self.limit

    def take(self, request_id: str, tokens: int) -> bool:
        """Count a prompt that vLLM is about to give to the engine.

        What comes from no HTTP request, or from one that is past refusing, is always let in.

        Args:
            request_id: vLLM's.
            tokens: of the prompt, times the answers to it.

        Returns:
            False if there is no room: the prompt must not reach the engine.

        """
        asking = _asking.get()
        if asking is None or asking.over:
            return True
        asking.asked = True
        if not asking.committed:
            own = asking.promised.total()
            others = self.tokens - own
            if others and others + own + tokens > self.limit:
                asking.refused = True
                return False
        asking.promised[request_id] += tokens
        self._promised += tokens
        return True

    def settle(self, request_id: str) -> None:
        """Stop counting a prompt because the engine counts it now, or will not get it."""
        asking = _asking.get()
        if asking is not None:
            asking.committed = True
            self._promised -= asking.promised.pop(request_id, 0)

    def close(self, asking: Asking) -> None:
        """Stop counting all that a request was promised and has not asked the engine for."""
        asking.over = True
        self._promised -= asking.promised.total()
        asking.promised.clear()


class QueueLimit:
    """ASGI layer that answers 429 to a request for which its `TokenQueue` has no room.

    Some of vLLM's routes begin a stream and ask the engine then, so an answer is held back until
    the engine was asked, or the answer is over.
    """

    def __init__(self, app: ASGIApp, queue: TokenQueue) -> None:
        self.app, self._queue = app, queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it in the place of its answer."""
        if scope["type"] != "http" or scope["method"] in FREE_METHODS:
            await self.app(scope, receive, send)
            return
        asking = Asking()
        held: list[Message] = []

        async def holding(message: Message) -> None:
            if asking.refused:
                return
            held.append(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)
            if asking.asked or whole:
                asking.committed = True
                while held:
                    await send(held.pop(0))

        token = _asking.set(asking)
        try:
            await self.app(scope, receive, holding)
        except Exception:
            # Of a refused request the error tells nothing else: the engine had no part of it.
            if not asking.refused:
                raise
        finally:
            self._queue.close(asking)
            _asking.reset(token)
        if asking.refused:
            note_refusal(scope, Refusal.QUEUED_TOKENS)
            text = f"Prompts of {self._queue.limit} tokens may wait at a time; try again."
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            await error_response(429, "RateLimitError", text, headers)(scope, receive, send)
