import asyncio
from collections import Counter
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from sliceserve.server.auth import Auth, KeyRing
from sliceserve.server.counting import Counting
from sliceserve.server.metrics import ServerMetrics


async def fine(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("fine")


async def broken(_request: Request) -> PlainTextResponse:
    raise RuntimeError


async def endless(_request: Request) -> StreamingResponse:
    async def parts() -> Any:
        while True:
            yield b"part"
            await asyncio.sleep(0)

    return StreamingResponse(parts())


ROUTES = {"/fine": fine, "/broken": broken, "/endless": endless}


def counting(counted: Any) -> Counting:
    app = Starlette(routes=[Route(path, handler) for path, handler in ROUTES.items()])
    guarded = Auth(app, KeyRing(["key"]), frozenset(), cross_origin=False)
    return Counting(guarded, frozenset(ROUTES), counted)


def test_every_answer_is_counted_once_under_a_known_route() -> None:
    counted: Counter[tuple[str, str]] = Counter()
    app = counting(lambda route, status: counted.update([(route, status)]))

    async def scenario() -> None:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        headers = {"Authorization": "Bearer key"}
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            for path in ("/fine", "/fine?x=1", "/broken", "/no/such", "/nor/this"):
                await client.get(path, headers=headers)
            await client.get("/fine")
            await client.get("/invented")

    asyncio.run(scenario())
    assert counted == {
        ("/fine", "200"): 2,
        ("/broken", "500"): 1,
        ("other", "404"): 2,
        ("/fine", "401"): 1,
        ("other", "401"): 1,
    }


@pytest.mark.parametrize("parts", [0, 3])
def test_a_client_that_leaves_is_counted_as_such(parts: int) -> None:
    counted: list[tuple[str, str]] = []
    app = counting(lambda route, status: counted.append((route, status)))

    async def scenario() -> None:
        sent = asyncio.Semaphore(0)
        requests = iter([{"type": "http.request", "body": b"", "more_body": False}])

        async def receive() -> Any:
            if (request := next(requests, None)) is not None:
                return request
            for _ in range(parts):
                await sent.acquire()
            return {"type": "http.disconnect"}

        async def send(_message: Any) -> None:
            sent.release()

        scope = {
            "type": "http", "method": "GET", "path": "/endless", "query_string": b"",
            "headers": [(b"authorization", b"Bearer key")],
        }  # fmt: skip
        await app(scope, receive, send)

    asyncio.run(scenario())
    assert counted == [("/endless", "disconnected")]


def test_the_series_is_a_counter_with_the_models_name() -> None:
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry, "m")
    for _ in range(2):
        metrics.count_response("/v1/completions", "429")
    labels = {"model_name": "m", "route": "/v1/completions", "status": "429"}
    assert registry.get_sample_value("sliceserve_http_responses_total", labels) == 2
