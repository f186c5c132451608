"""What each API key may take: requests at a time, requests and tokens a minute."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sliceserve.server.admission import FREE_METHODS, RETRY_AFTER_S
from sliceserve.server.exchange import Refusal, exchange_of, key_of, note_refusal, take_usage
from sliceserve.server.responses import error_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


@dataclass(frozen=True)
class KeyLimits:
    """The limits of each key; None is none.

    Attributes:
        requests: at a time.
        requests_per_minute: in a minute that begins with the first of them.
        tokens_per_minute: of prompts and answers, likewise; known when an answer has ended.

    """

    requests: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None


NO_LIMITS = KeyLimits(None, None, None)
_MINUTE_S = 60.0


class _Minutes:
    """What each key takes of one thing, in a minute that begins with the first of it.

    Attributes:
        most: that a key may take in a minute.

    """

    def __init__(self, most: int) -> None:
        self.most = most
        # By key, when its minute ends, in seconds of a clock that nobody sets, and what it took.
        self._minutes: dict[str, tuple[float, int]] = {}

    def take(self, key: str, cost: int) -> None:
        """Count what a key takes, over its limit too."""
        now = time.monotonic()
        end, taken = self._minutes.get(key, (now, 0))
        if now >= end:
            end, taken = now + _MINUTE_S, 0
        self._minutes[key] = end, taken + cost

    def wait(self, key: str) -> int:
        """Return the whole seconds until the key may take more; 0 if it may now."""
        end, taken = self._minutes.get(key, (0.0, 0))
        return 0 if taken < self.most else max(0, math.ceil(end - time.monotonic()))


class PerKey:
    """ASGI layer within `Auth` that answers 429 to a key that is over one of its limits.

    The request that crosses the limit of tokens is answered in full; the next ones wait. A
    WebSocket is one request for as long as it is open, and its tokens are not known.
    """

    def __init__(self, app: ASGIApp, limits: KeyLimits) -> None:
        self.app, self._limits = app, limits
        self._running: Counter[str] = Counter()
        amounts = {
            Refusal.KEY_REQUESTS: limits.requests_per_minute,
            Refusal.KEY_TOKENS: limits.tokens_per_minute,
        }
        self._rates = {
            reason: _Minutes(amount) for reason, amount in amounts.items() if amount is not None
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        key = key_of(scope)
        if key is None or scope.get("method") in FREE_METHODS:
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(key)
        if refusal is not None:
            reason, text, wait = refusal
            note_refusal(scope, reason)
            answer = error_response(429, "RateLimitError", text, {"Retry-After": str(wait)})
            await answer(scope, receive, send)
            return
        self._count(Refusal.KEY_REQUESTS, key, 1)
        self._running[key] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]
            if (exchange := exchange_of(scope)) is not None:
                take_usage(exchange, scope)
                self._count(Refusal.KEY_TOKENS, key, exchange.tokens)

    def _count(self, rate: Refusal, key: str, cost: int) -> None:
        if rate in self._rates and cost:
            self._rates[rate].take(key, cost)

    def _refusal(self, key: str) -> tuple[Refusal, str, int] | None:
        """Return why the key's next request is refused, a sentence, and the seconds to wait."""
        most = self._limits.requests
        if most is not None and self._running[key] >= most:
            text = f"The key has {most} requests at work, as many as it may; try again."
            return Refusal.KEY_FULL, text, RETRY_AFTER_S
        for reason, rate in self._rates.items():
            if wait := rate.wait(key):
                what = "requests" if reason is Refusal.KEY_REQUESTS else "tokens"
                text = f"The key may take {rate.most} {what} a minute; try again in {wait} s."
                return reason, text, wait
        return None
