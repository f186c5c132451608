"""Streams whose client leaves, over real sockets: they end without a task that waits for that."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from socket_server import POST, Application, Play, Serving, playing, until
from starlette.requests import Request
from starlette.responses import StreamingResponse

from sliceserve.server.deadline import Deadline
from sliceserve.server.exchange import Exchange, Watch
from sliceserve.server.faults import Faults
from sliceserve.server.queued import QueueLimit, TokenQueue
from sliceserve.server.streams import Streams

SECONDS = 0.3
LARGE = 100_000  # more than uvicorn holds of a body before it stops to read


@dataclass
class Streaming:
    """Answers a POST with one event and, unless it is let go on, no other; below /sized, with 2."""

    asked: int = 0
    may_begin: bool = True
    begun: int = 0
    ended: list[str] = field(default_factory=list)
    receives: int = 0
    exchanges: list[Exchange] = field(default_factory=list)
    queue: TokenQueue | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted() -> Any:
            self.receives += 1
            return await receive()

        request = Request(scope, counted)
        await request.body()
        self.asked += 1
        await until(lambda: self.may_begin)
        self.receives = 0
        parts = self.parts(scope["path"])
        await StreamingResponse(parts, media_type="text/event-stream")(scope, counted, send)

    async def parts(self, path: str) -> AsyncIterator[str]:
        self.begun += 1
        how = "ended"
        try:
            yield "data: 1\n\n"
            if not path.startswith("/sized"):
                await asyncio.Event().wait()
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            how = "cancelled"
            raise
        finally:
            self.ended.append(how)

    def layers(self, seconds: float) -> Watch:
        app: Any = Streams(self) if self.queue is None else QueueLimit(Streams(self), self.queue)
        return Watch(Deadline(Faults(app), seconds), frozenset(), self.exchanges.append)


@contextmanager
def streaming(
    loop: str, caplog: pytest.LogCaptureFixture, seconds: float = 60
) -> Iterator[tuple[Streaming, Play]]:
    app = Streaming()

    def layered(_unused: Application) -> Any:
        return app.layers(seconds)

    with playing(loop, caplog, layered) as play:
        yield app, play


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("size", [2, LARGE])
def test_a_stream_that_waits_ends_when_its_client_leaves(
    loop: str, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client((POST % (b"", size)) + b"x" * size) as client:
            await client.reader.readuntil(b"data: 1\n\n")
            assert app.receives == 0
            client.reset()
            await until(lambda: bool(app.exchanges))

    with streaming(loop, caplog) as (app, play):
        play(scenario)
    assert app.ended == ["cancelled"]
    (exchange,) = app.exchanges
    assert (exchange.status, exchange.disconnected, exchange.failed) == (200, True, None)


@pytest.mark.parametrize("leaves", [True, False])
def test_a_stream_whose_beginning_the_queue_holds_ends_too(
    loop: str, caplog: pytest.LogCaptureFixture, *, leaves: bool
) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client((POST % (b"", 2)) + b"{}") as client:
            await until(lambda: bool(app.begun))
            if leaves:
                client.reset()
            else:
                status, _, body = await client.answer()
                assert status == json.loads(body)["error"]["code"] == 408
            await until(lambda: bool(app.exchanges))

    with streaming(loop, caplog, 60 if leaves else SECONDS) as (app, play):
        app.queue = TokenQueue(100, lambda: 0)
        play(scenario)
    assert app.ended == ["cancelled"]
    assert [one.disconnected for one in app.exchanges] == [leaves]


def test_a_stream_whose_time_is_up_ends_with_an_error(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client((POST % (b"", 2)) + b"{}") as client:
            said = await client.reader.readuntil(b"0\r\n\r\n")
        *_, error, _done, _end = said.decode().split("\n\n")
        assert json.loads(error.partition("data: ")[2])["error"]["code"] == 408

    with streaming(loop, caplog, SECONDS) as (app, play):
        play(scenario)
    assert app.ended == ["cancelled"]
    assert [one.disconnected for one in app.exchanges] == [False]


def test_a_stream_that_ends_stays_as_it_is_and_its_connection_goes_on(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            for _ in range(2):
                client.send((POST % (b"sized", 2)) + b"{}")
                said = await client.reader.readuntil(b"0\r\n\r\n")
                assert b"data: 1\n\n" in said
                assert b"[DONE]" in said
            connection = await serving.connection()
            assert not connection._unanswered

    with streaming(loop, caplog) as (app, play):
        play(scenario)
    assert app.ended == ["ended"] * 2
    assert [one.disconnected for one in app.exchanges] == [False] * 2


def test_who_asks_again_before_the_answer_and_leaves_ends_both(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The second request never begins: its turn does not come."""

    async def scenario(serving: Serving) -> None:
        async with serving.client(((POST % (b"", 2)) + b"{}") * 2) as client:
            await client.reader.readuntil(b"data: 1\n\n")
            client.reset()
            await until(lambda: bool(app.exchanges))

    with streaming(loop, caplog) as (app, play):
        play(scenario)
    assert (app.begun, app.ended) == (1, ["cancelled"])


def test_a_client_that_leaves_before_its_answer_begins_ends_it(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing waits for it meanwhile."""

    async def scenario(serving: Serving) -> None:
        async with serving.client((POST % (b"", 2)) + b"{}") as client:
            await until(lambda: bool(app.asked))
            client.reset()
            await until(lambda: not serving.connections)
            app.may_begin = True
            await until(lambda: bool(app.exchanges))

    with streaming(loop, caplog) as (app, play):
        app.may_begin = False
        play(scenario)
    assert app.ended == ["cancelled"]
    assert app.exchanges[0].disconnected
