"""Bounds on requests and bodies, in one process with httpx and the openai client."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from sliceserve.server.admission import Admission, Limits
from sliceserve.server.health import Health, Lifecycle, Phase, Readiness
from sliceserve.server.listener import Listener

LIMITS = Limits(requests=2, body_bytes=1000, body_seconds=60)


class Slow:
    """An application whose requests end when they are let."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.begun = 0
        self.going = asyncio.Event()
        routes = [
            Route("/echo", self.echo, methods=["GET", "POST"]),
            Route("/slow", self.slow, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]
        self.admission = Admission(Starlette(routes=routes), limits)

    async def echo(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse(await request.body())

    async def slow(self, _request: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            self.begun += 1
            yield b"begun "
            await self.going.wait()
            yield b"ended"

        return StreamingResponse(parts())

    async def complete(self, _request: Request) -> JSONResponse:
        choice = {"index": 0, "text": "answer", "finish_reason": "stop"}
        return JSONResponse({"id": "1", "object": "text_completion", "choices": [choice]})

    async def fill(self, client: httpx.AsyncClient) -> "list[asyncio.Task[httpx.Response]]":
        tasks = [asyncio.ensure_future(client.post("/slow")) for _ in range(LIMITS.requests)]
        while self.begun < LIMITS.requests:
            await asyncio.sleep(0)
        return tasks


def client_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server")


def error_of(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == status
    return str(error["message"])


def test_over_the_bound_a_request_is_refused_at_once() -> None:
    async def scenario() -> None:
        slow = Slow()
        lifecycle = Lifecycle(Phase.SERVING)
        readiness = Readiness(lifecycle, overloaded=lambda: slow.admission.full)
        health = Health(slow.admission, readiness)
        async with client_of(health) as client:
            assert (await client.get("/readyz")).status_code == 200
            running = await slow.fill(client)
            refused = await client.post("/slow")
            assert "2 requests" in error_of(refused, 429)
            assert int(refused.headers["retry-after"]) > 0
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.json()["status"]) == (503, "overloaded")
            assert (await client.get("/livez")).status_code == 200
            assert (await client.get("/echo")).status_code == 200
            slow.going.set()
            assert [(await task).text for task in running] == ["begun ended"] * 2
            assert (await client.get("/readyz")).status_code == 200
            assert (await client.post("/slow")).text == "begun ended"

    asyncio.run(scenario())


def test_a_full_server_reads_no_body() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def scenario() -> None:
        full = Slow(Limits(requests=0, body_bytes=1000, body_seconds=60)).admission
        await full({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send)

    asyncio.run(scenario())
    assert sent[0]["status"] == 429


def test_a_client_that_leaves_makes_room() -> None:
    async def scenario() -> None:
        slow = Slow()
        async with client_of(slow.admission) as client:
            running = await slow.fill(client)
            running[0].cancel()
            await asyncio.wait([running[0]])
            assert not slow.admission.full
            slow.going.set()
            assert (await client.post("/slow")).text == "begun ended"
            await running[1]

    asyncio.run(scenario())


def test_the_openai_client_tries_again_after_429() -> None:
    statuses: list[int] = []

    async def scenario() -> None:
        slow = Slow()

        async def watched(scope: Any, receive: Any, send: Any) -> None:
            async def noting(message: Any) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])
                await send(message)
                slow.going.set()

            await slow.admission(scope, receive, noting)

        config = uvicorn.Config(watched, lifespan="off", log_level="critical")
        listener = Listener(config)
        with socket.create_server(("127.0.0.1", 0)) as bound:
            url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
            serving = asyncio.ensure_future(listener.serve(sockets=[bound]))
            async with client_of(slow.admission) as filler:
                running = await slow.fill(filler)
                async with openai.AsyncOpenAI(base_url=url, api_key="key", max_retries=1) as client:
                    answer = await client.completions.create(model="m", prompt="hi")
                await asyncio.gather(*running)
            listener.should_exit = True
            await serving
        assert answer.choices[0].text == "answer"

    asyncio.run(scenario())
    assert statuses == [429, 200]


def chunked(*chunks: bytes, pause: float = 0) -> AsyncIterator[bytes]:
    async def generate() -> AsyncIterator[bytes]:
        for chunk in chunks:
            await asyncio.sleep(pause)
            yield chunk

    return generate()


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize(("size", "status"), [(0, 200), (1000, 200), (1001, 413), (100_000, 413)])
def test_the_size_of_a_body_is_bounded(announced: bool, size: int, status: int) -> None:
    async def scenario() -> None:
        body = bytes(range(250)) * (size // 250) + bytes(size % 250)
        content = (
            body if announced else chunked(*(body[at : at + 300] for at in range(0, size, 300)))
        )
        async with client_of(Slow().admission) as client:
            answer = await client.post("/echo", content=content)
        if status == 200:
            assert answer.content == body
        else:
            assert "1000 bytes" in error_of(answer, status)

    asyncio.run(scenario())


def test_a_body_that_never_ends_is_given_up_and_takes_no_room() -> None:
    async def scenario() -> None:
        slow = Slow(Limits(requests=2, body_bytes=1000, body_seconds=0.2))

        async def never() -> Any:
            assert not slow.admission.full
            await asyncio.Event().wait()

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/echo", "headers": []}
        await asyncio.gather(*(slow.admission(scope, never, send) for _ in range(5)))
        assert [part["status"] for part in sent if "status" in part] == [408] * 5
        assert b"within 0.2 s" in sent[1]["body"]

    asyncio.run(scenario())


def test_a_client_that_leaves_before_its_body_is_whole_gets_nothing() -> None:
    async def scenario() -> None:
        parts = iter([{"type": "http.request", "body": b"{", "more_body": True}])

        async def receive() -> Any:
            return next(parts, {"type": "http.disconnect"})

        async def send(_message: Any) -> None:
            raise AssertionError("there is nobody to answer")

        scope = {"type": "http", "method": "POST", "path": "/echo", "headers": []}
        await Slow().admission(scope, receive, send)

    asyncio.run(scenario())
