"""What each API key may take: requests at a time, requests and tokens a minute."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

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


class PerKey:
    """ASGI layer within `Auth` that answers 429 to a key that is over one of its limits.

    The request that crosses the limit of tokens is answered in full; the next ones wait. A
    WebSocket is one request for as long as it is open, and its tokens are not known.
    """

    def __init__(self, app: ASGIApp, limits: KeyLimits) -> None:
        self.app, self._limits = app, limits
        self._running: Counter[str] = Counter()
        self._windows = FixedWindowRateLimiter(MemoryStorage())
        self._rates = {
            reason: RateLimitItemPerMinute(amount, namespace=reason)
            for reason, amount in (
                (Refusal.KEY_REQUESTS, limits.requests_per_minute),
                (Refusal.KEY_TOKENS, limits.tokens_per_minute),
            )
            if amount is not None
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
            self._windows.hit(self._rates[rate], key, cost=cost)

    def _refusal(self, key: str) -> tuple[Refusal, str, int] | None:
        """Return why the key's next request is refused, a sentence, and the seconds to wait."""
        most = self._limits.requests
        if most is not None and self._running[key] >= most:
            text = f"The key has {most} requests at work, as many as it may; try again."
            return Refusal.KEY_FULL, text, RETRY_AFTER_S
        for reason, rate in self._rates.items():
            if not self._windows.test(rate, key):
                reset = self._windows.get_window_stats(rate, key).reset_time
                wait = max(1, math.ceil(reset - time.time()))
                what = "requests" if reason is Refusal.KEY_REQUESTS else "tokens"
                text = f"The key may take {rate.amount} {what} a minute; try again in {wait} s."
                return reason, text, wait
        return None
