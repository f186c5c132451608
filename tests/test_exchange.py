"""What is known of a request once it is over: its name, its counter, its line in the log."""

import asyncio
import hashlib
import json
import os
import resource
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from sliceserve.server.access_log import as_line, open_access_log
from sliceserve.server.arguments import Arguments
from sliceserve.server.auth import Auth, KeyRing
from sliceserve.server.bounds import Bounds
from sliceserve.server.exchange import Exchange, Watch
from sliceserve.server.metrics import ServerMetrics
from sliceserve.server.streams import Streams, share_leaving
from sliceserve.server.tracing import Trace
from sliceserve.slicing.errors import UserError

BOUNDS = Bounds(8, None, 4)
DONE = Exchange("a1", "POST", 0.0, "/v1/completions", status=200, seconds=1.5)


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


async def echo(request: Request) -> PlainTextResponse:
    """The id and the body that a route sees."""
    headers = {"X-Request-ID": "from the application"}
    seen = f"{request.headers.getlist('x-request-id')} {(await request.body()).decode()}"
    return PlainTextResponse(seen, headers=headers)


ROUTES = {"/fine": fine, "/broken": broken, "/endless": endless, "/items/{item}": echo}


def watched(report: Any) -> Watch:
    methods = ["GET", "POST"]
    routes = [Route(path, handler, methods=methods) for path, handler in ROUTES.items()]
    app = Arguments(Starlette(routes=routes), BOUNDS)
    guarded = Auth(app, KeyRing(["key"]), frozenset())
    return Watch(guarded, frozenset(ROUTES), report)


def ask(method: str, path: str, body: bytes = b"", **headers: str) -> tuple[httpx.Response, Any]:
    """The answer, and what was reported."""
    reported: list[Exchange] = []

    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app=watched(reported.append))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.request(method, path, content=body, headers=named)

    answer = asyncio.run(once())
    (exchange,) = reported
    return answer, exchange


@pytest.mark.parametrize("given", ["a", "A1-b_c.d:e", "f" * 128])
def test_a_sane_request_id_is_kept_and_comes_back_once(given: str) -> None:
    answer, exchange = ask("POST", "/items/1", authorization="Bearer key", x_request_id=given)
    assert answer.text == f"['{given}'] "
    assert answer.headers.get_list("x-request-id") == [given]
    assert exchange.id == given


@pytest.mark.parametrize("given", [None, "", "g" * 129, "a b", 'a"b', "a\tb", "<a>", "%0a"])
def test_other_request_ids_are_made(given: str | None) -> None:
    headers = {} if given is None else {"x_request_id": given}
    made = [ask("GET", "/fine", **headers)[0].headers["x-request-id"] for _ in range(2)]
    assert all(len(each) == 32 and int(each, 16) >= 0 for each in made)
    assert len({given, *made}) == 3


def test_a_request_is_described_without_its_text() -> None:
    body = b'{"model": "m", "prompt": "secret"}'
    answer, exchange = ask("POST", "/items/7", body, authorization="Bearer key")
    assert answer.text.endswith(body.decode())
    assert exchange.key == hashlib.sha256(b"key").hexdigest()[:8]
    assert (exchange.route, exchange.model, exchange.status) == ("/items/{item}", "m", 200)
    assert exchange.prompt_tokens is exchange.generation_tokens is None
    assert exchange.first_byte_seconds is not None
    assert 0 <= exchange.first_byte_seconds <= exchange.seconds
    assert "secret" not in str(exchange)
    refused, exchange = ask("POST", "/items/7", body, authorization="Bearer secret")
    assert refused.headers["x-request-id"] == exchange.id
    assert (exchange.route, exchange.key, exchange.status) == ("other", None, 401)


@pytest.mark.parametrize("inner", [lambda app: app, Streams])
def test_a_traced_request_has_its_route_too(inner: Callable[[Any], Any]) -> None:
    reported: list[Exchange] = []
    template = "/items/{item}"
    routed = inner(Starlette(routes=[Route(template, fine)]))

    async def told(scope: Any, receive: Any, send: Any) -> None:
        share_leaving(scope, asyncio.get_running_loop().create_future())
        await routed(scope, receive, send)

    traced = Trace(told, frozenset({template}), frozenset())

    async def once() -> None:
        watch = Watch(traced, frozenset({template}), reported.append)
        transport = httpx.ASGITransport(app=watch)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            assert (await client.get("/items/7")).text == "fine"

    asyncio.run(once())
    assert reported[0].route == template


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff", b'{"model": 1}'])
def test_other_bodies_pass_as_they_are(body: bytes) -> None:
    async def length(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(len(await request.body())))

    async def once() -> httpx.Response:
        app = Arguments(Starlette(routes=[Route("/", length, methods=["POST"])]), BOUNDS)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post("/", content=body)

    assert asyncio.run(once()).text == str(len(body))


def test_a_line_of_the_access_log(tmp_path: Path) -> None:
    file = tmp_path / "log"
    log = open_access_log(str(file))
    log(replace(DONE, time=1e9, model="m" * 1000, key="0123abcd", prompt_tokens=3))
    log(replace(DONE, status=None, disconnected=True))
    log(replace(DONE, route="/livez"))
    log(replace(DONE, route="/livez", status=503))
    first, left, failing = map(json.loads, file.read_text().splitlines())
    assert first == {
        "time": "2001-09-09T01:46:40.000+00:00", "id": "a1", "method": "POST",
        "route": "/v1/completions", "key": "0123abcd", "model": "m" * 128, "status": 200,
        "failed": None, "refused": None, "disconnected": False, "prompt_tokens": 3,
        "generation_tokens": None, "seconds": 1.5, "first_byte_seconds": None, "chunks": 0,
    }  # fmt: skip
    assert datetime.fromisoformat(first["time"]) == datetime.fromtimestamp(1e9, UTC)
    assert (left["status"], left["disconnected"]) == (None, True)
    assert (failing["route"], failing["status"]) == ("/livez", 503)


def test_a_full_disk_is_told_once_and_fails_no_request(caplog: pytest.LogCaptureFixture) -> None:
    log = open_access_log("/dev/full")
    for _ in range(3):
        log(DONE)
    (record,) = caplog.records
    assert "No space left on device" in record.getMessage()


def test_a_line_that_is_taken_in_parts_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    write = os.write

    def write_some(descriptor: int, data: bytes) -> int:
        taken.append(write(descriptor, data[:7]))
        return taken[-1]

    log = open_access_log(str(tmp_path / "log"))
    monkeypatch.setattr(os, "write", write_some)
    for number in ("a1", "a2"):
        log(replace(DONE, id=number))
    lines = (tmp_path / "log").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a1", "a2"]
    assert len(taken) > 20


def test_a_line_that_is_cut_off_spoils_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, limits = tmp_path / "log", resource.getrlimit(resource.RLIMIT_FSIZE)
    log = open_access_log(str(file))
    log(replace(DONE, id="first"))
    size = file.stat().st_size
    # Stands in for a disk that fills up in the middle of a line. No other file may reach the limit.
    room = 10 * 2**20
    with file.open("ab") as padding:
        padding.truncate(room)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room + 100, limits[1]))
        log(replace(DONE, id="cut"))
        log(replace(DONE, id="lost"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log(replace(DONE, id="whole"))
    log(replace(DONE, id="last"))
    (record,) = caplog.records
    assert "The access log loses lines" in record.getMessage()
    cut, *rest = file.read_bytes()[size:].lstrip(b"\0").splitlines()
    assert cut == as_line(replace(DONE, id="cut"))[:100]
    assert [json.loads(line)["id"] for line in rest] == ["whole", "last"]


def test_a_log_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--access-log '.*none/log': No such file"):
        open_access_log(str(tmp_path / "none" / "log"))


def test_every_answer_is_counted_once_under_a_known_route() -> None:
    counted: Counter[tuple[str, str]] = Counter()
    app = watched(lambda exchange: counted.update([(exchange.route, str(exchange.status))]))

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


@pytest.mark.parametrize(
    ("event", "failed"),
    [
        (b'data: {"error": {"code": 408}}\n\ndata: [DONE]\n\n', 408),
        (b'data: {"error": {"message": "it died"}}\n\n', 500),
        (b"event: error\ndata: {}\n\n", 500),
        (b'event: error\ndata: {"type": "error", "error": {"code": 400}}\n\n', 400),
        (b'data: {"choices": [{"text": "data: {\\"error\\""}]}\n\n', None),
    ],
)
def test_a_stream_that_fails_is_counted_as_its_error(event: bytes, failed: int | None) -> None:
    async def stream(_request: Request) -> StreamingResponse:
        async def parts() -> Any:
            yield b"data: 1\n\n"
            yield event

        return StreamingResponse(parts(), media_type="text/event-stream")

    registry = CollectorRegistry()
    metrics = ServerMetrics(registry, "m")
    reported: list[Exchange] = []
    app = Starlette(routes=[Route("/stream", stream)])
    watch = Watch(app, frozenset({"/stream"}), metrics.count_response, reported.append)

    async def once() -> None:
        transport = httpx.ASGITransport(app=watch)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            await client.get("/stream")

    asyncio.run(once())
    assert [(one.status, one.failed) for one in reported] == [(200, failed)]
    labels = {"model_name": "m", "route": "/stream", "status": str(failed or 200)}
    assert registry.get_sample_value("sliceserve_http_responses_total", labels) == 1


@pytest.mark.parametrize("parts", [0, 3])
def test_a_client_that_leaves_is_counted_as_such(parts: int) -> None:
    counted: list[tuple[str, bool]] = []
    app = watched(lambda exchange: counted.append((exchange.route, exchange.disconnected)))

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
    assert counted == [("/endless", True)]


def test_the_series_is_a_counter_with_the_models_name() -> None:
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry, "m")
    for disconnected in (False, False, True):
        metrics.count_response(replace(DONE, status=429, disconnected=disconnected))
    labels = {"model_name": "m", "route": "/v1/completions"}
    for status, expected in (("429", 2), ("disconnected", 1)):
        found = registry.get_sample_value(
            "sliceserve_http_responses_total", labels | {"status": status}
        )
        assert found == expected
