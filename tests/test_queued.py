"""The bound on the tokens of prompts that wait, with a stand-in for vLLM's routes and engine."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, make_asgi_app
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sliceserve.server.auth import KeyRing
from sliceserve.server.exchange import Exchange, Refusal, Watch
from sliceserve.server.health import EngineProbe, Lifecycle, Phase
from sliceserve.server.layering import Access, while_serving
from sliceserve.server.metrics import ServerMetrics
from sliceserve.server.queued import QueueLimit, TokenQueue
from sliceserve.server.settings import ServerSettings

LIMIT = 100


class NoRoomError(Exception):
    pass


class StandIn:
    """An engine in which prompts wait until they may go, and routes as vLLM has them."""

    def __init__(self) -> None:
        self.waiting: dict[str, int] = {}
        self.going = asyncio.Event()
        self.background: asyncio.Task[list[str]] | None = None
        self.queue = TokenQueue(LIMIT, lambda: sum(self.waiting.values()))
        handlers = {
            "whole": self.whole, "early": self.early, "late": self.late, "lost": self.lost,
            "later": self.later, "nothing": self.nothing,
        }  # fmt: skip
        routes = [Route(f"/{name}", each, methods=["POST"]) for name, each in handlers.items()]
        self.reported: list[Exchange] = []
        limited = QueueLimit(Starlette(routes=routes), self.queue)
        self.app = Watch(limited, frozenset(), self.reported.append)

    def ask(self, name: str, tokens: int) -> AsyncIterator[str]:
        if not self.queue.take(name, tokens):
            raise NoRoomError
        return self._answer(name, tokens)

    async def _answer(self, name: str, tokens: int) -> AsyncIterator[str]:
        try:
            self.waiting[name] = tokens
            await asyncio.sleep(0)
            self.queue.settle(name)
            await self.going.wait()
        finally:
            del self.waiting[name]
        yield "data: token\n\n"

    def ask_all(self, asked: dict[str, int]) -> list[AsyncIterator[str]]:
        return [self.ask(name, tokens) for name, tokens in asked.items()]

    async def whole(self, request: Request) -> Response:
        """Ask in a task of its own, answer in one piece."""
        answers = self.ask_all(await request.json())
        parts = [part for answer in answers async for part in answer]
        return JSONResponse(await asyncio.create_task(self._last(parts)))

    async def _last(self, parts: list[str]) -> str:
        return parts[-1]

    async def early(self, request: Request) -> Response:
        """Ask, then begin a stream."""
        (answer,) = self.ask_all(await request.json())
        return StreamingResponse(answer, media_type="text/event-stream")

    async def late(self, request: Request) -> Response:
        """Begin a stream, then ask; what goes wrong becomes an event of it."""
        asked = await request.json()

        async def parts() -> AsyncIterator[str]:
            yield "data: created\n\n"
            try:
                for name, tokens in asked.items():
                    async for part in self.ask(name, tokens):
                        yield part
            except NoRoomError:
                yield "data: error\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")

    async def lost(self, request: Request) -> Response:
        """Ask, and fail before the engine hears of it."""
        self.ask_all(await request.json())
        raise RuntimeError

    async def later(self, request: Request) -> Response:
        """Answer, and then ask."""
        asked = await request.json()
        answered = asyncio.Event()

        async def ask() -> list[str]:
            await answered.wait()
            return [part for answer in self.ask_all(asked) async for part in answer]

        self.background = asyncio.create_task(ask())
        return JSONResponse("queued", background=BackgroundTask(answered.set))

    async def nothing(self, _request: Request) -> Response:
        async def parts() -> AsyncIterator[str]:
            yield "a"
            yield "b"

        return StreamingResponse(parts())


async def post(standing: StandIn, path: str, **asked: int) -> httpx.Response:
    transport = httpx.ASGITransport(app=standing.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.post(path, content=json.dumps(asked))


async def fill(standing: StandIn, tokens: int) -> "asyncio.Task[httpx.Response]":
    task = asyncio.ensure_future(post(standing, "/whole", first=tokens))
    while "first" not in standing.waiting:
        await asyncio.sleep(0)
    while standing.queue.tokens != tokens:  # it is settled
        await asyncio.sleep(0)
    return task


@pytest.mark.parametrize("path", ["/whole", "/early", "/late"])
def test_over_the_bound_the_answer_is_a_429(path: str) -> None:
    async def scenario() -> None:
        standing = StandIn()
        first = await fill(standing, 60)
        refused = await post(standing, path, other=41)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == 429
        assert "100 tokens" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) > 0
        assert standing.reported[0].refused is Refusal.QUEUED_TOKENS
        assert standing.queue.tokens == 60
        second = asyncio.ensure_future(post(standing, path, other=40))
        while "other" not in standing.waiting:
            await asyncio.sleep(0)
        standing.going.set()
        assert [(await task).status_code for task in (first, second)] == [200, 200]
        assert standing.queue.tokens == 0

    asyncio.run(scenario())


def test_the_prompts_of_a_request_need_room_together() -> None:
    async def scenario() -> None:
        standing = StandIn()
        first = await fill(standing, 60)
        assert (await post(standing, "/whole", a=20, b=20, c=20)).status_code == 429
        assert standing.queue.tokens == 60
        assert set(standing.waiting) == {"first"}
        standing.going.set()
        await first
        # Alone it is not too much, nor is anything else.
        assert (await post(standing, "/whole", a=20, b=20, c=2000)).status_code == 200

    asyncio.run(scenario())


def test_what_never_reaches_the_engine_gives_its_share_back() -> None:
    async def scenario() -> None:
        standing = StandIn()
        first = await fill(standing, 60)
        assert (await post(standing, "/lost", a=20, b=10)).status_code == 500
        assert standing.queue.tokens == 60
        first.cancel()
        await asyncio.wait([first])
        assert standing.queue.tokens == 0

    asyncio.run(scenario())


def test_a_client_that_leaves_gives_its_share_back() -> None:
    async def scenario() -> None:
        standing = StandIn()
        left = asyncio.ensure_future(post(standing, "/early", a=90))
        while standing.queue.tokens != 90:
            await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait([left])
        assert standing.queue.tokens == 0

    asyncio.run(scenario())


def test_a_stream_that_has_begun_is_not_refused_later() -> None:
    async def scenario() -> None:
        standing = StandIn()
        standing.going.set()
        begun = asyncio.ensure_future(post(standing, "/late", a=10, b=95))
        while "a" not in standing.waiting:
            await asyncio.sleep(0)
        standing.waiting["of another"] = 50
        answer = await begun
        assert answer.status_code == 200
        assert answer.text.split() == ["data:", "created", *["data:", "token"] * 2]

    asyncio.run(scenario())


def test_what_is_asked_for_after_the_answer_is_let_in() -> None:
    async def scenario() -> None:
        standing = StandIn()
        first = await fill(standing, 60)
        assert (await post(standing, "/later", other=90)).text == '"queued"'
        while "other" not in standing.waiting:
            await asyncio.sleep(0)
        assert standing.queue.tokens == 60 + 90
        standing.going.set()
        assert await standing.background == ["data: token\n\n"]
        await first
        assert standing.queue.tokens == 0

    asyncio.run(scenario())


def test_what_asks_the_engine_for_nothing_passes() -> None:
    async def scenario() -> None:
        standing = StandIn()
        await fill(standing, 200)
        assert standing.queue.full
        assert (await post(standing, "/nothing")).text == "ab"

    asyncio.run(scenario())


@pytest.mark.parametrize(("limit", "status"), [(11, 200), (10, 503), (None, 200)])
def test_a_full_queue_makes_the_server_unready(limit: int | None, status: int) -> None:
    class Engine:
        queue = None if limit is None else TokenQueue(limit, lambda: 10)

        def queued_tokens(self) -> int:
            return 10

        async def answer(self) -> None:
            pass

    engine: Any = Engine()
    registry = CollectorRegistry()
    app = FastAPI()
    app.mount("/metrics", make_asgi_app(registry))
    serving, _ = while_serving(
        app,
        engine,
        EngineProbe(engine.answer, 1),
        Access(KeyRing(), frozenset(), {}),
        ServerSettings(),
        Lifecycle(Phase.SERVING),
        ServerMetrics(registry, "m"),
        lambda _exchange: None,
        max_logprobs=20,
        vocabulary=257,
        traces=False,
    )

    async def once() -> None:
        transport = httpx.ASGITransport(app=serving)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            ready = await client.get("/readyz")
            assert ready.status_code == status
            assert ready.json()["status"] == ("serving" if status == 200 else "overloaded")
            shown = (await client.get("/metrics/")).text
            assert 'sliceserve_queued_prompt_tokens{model_name="m"} 10.0' in shown

    asyncio.run(once())


def test_what_is_no_http_request_is_let_in() -> None:
    queue = TokenQueue(LIMIT, lambda: 1000)
    assert queue.take("warm-up", 50)
    queue.settle("warm-up")
    assert queue.tokens == 1000
