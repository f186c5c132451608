"""The minutes of a key, of which a clock that somebody sets knows nothing."""

import asyncio
import math
import time

import pytest
from asgi_application import Application, client_of, error_of

from sliceserve.server.auth import Auth, KeyRing
from sliceserve.server.exchange import Watch
from sliceserve.server.per_key import KeyLimits, PerKey


@pytest.mark.parametrize("limits", [KeyLimits(None, 1, None), KeyLimits(None, None, 1)])
@pytest.mark.parametrize("set_by", [-3600, 3600])
def test_a_minute_of_a_key_is_one_whatever_the_clock_says(
    limits: KeyLimits, set_by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = Auth(PerKey(Application().app, limits), KeyRing(["a"]), frozenset())
    app = Watch(keys, frozenset(), lambda _exchange: None)
    began, said = math.ceil(time.monotonic()), time.time()

    async def scenario() -> None:
        async with client_of(app) as client:

            async def ask(later: float) -> tuple[int, str | None]:
                monkeypatch.setattr(time, "monotonic", lambda: began + later)
                answer = await client.post("/answer")
                wait = answer.headers.get("retry-after")
                if wait is not None:
                    assert f"try again in {wait} s." in error_of(answer, 429)["message"]
                return answer.status_code, wait

            assert await ask(0) == (200, None)
            monkeypatch.setattr(time, "time", lambda: said + set_by)
            assert await ask(0) == (429, "60")
            assert await ask(20.5) == (429, "40")
            assert await ask(60) == (200, None)
            # Another minute has begun, at its own first request.
            assert await ask(119.5) == (429, "1")
            assert await ask(120) == (200, None)

    asyncio.run(scenario())
