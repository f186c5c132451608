"""Heads of requests that are slow, too large or no HTTP, over real sockets to a real uvicorn."""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator

import httpx
import pytest
import uvicorn
import uvloop
from socket_server import Application, Serving, until
from starlette.responses import PlainTextResponse

from sliceserve.server import protocol
from sliceserve.server.listener import listening
from sliceserve.server.protocol import BoundedProtocol
from sliceserve.server.serve import make_parser, parse_arguments

BYTES, HEADERS, PATIENCE_S = 1000, 20, 60
SLOW_S = 0.3
GET = b"GET /%b HTTP/1.1\r\nHost: server\r\n%b\r\n"
POST = b"POST /%b HTTP/1.1\r\nHost: server\r\nContent-Length: %d\r\n\r\n"
CHUNKED = b"POST /%b HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
TOO_LARGE = pytest.mark.parametrize(
    "head",
    [
        GET % (b"x" * BYTES, b""),
        GET % (b"x", b"A: " + b"x" * BYTES + b"\r\n"),
        GET % (b"x", b"A: 1\r\n" * HEADERS),
        b"GET /" + b"x" * BYTES,
        b"GET /x HTTP/1.1\r\nA: " + b"x" * BYTES,
        b"GET /x HTTP/1.1\r\n" + b"A: 1\r\n" * (HEADERS + 1) + b"B: ",
        b"\r\n" * BYTES,
    ],
    ids=["url", "header", "headers", "open url", "open header", "open headers", "blank lines"],
)


Scenario = Callable[[Serving], Awaitable[None]]
Play = Callable[[Scenario], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def play(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[Play]:
    """Run a scenario against a server with small bounds, on both kinds of loops that we use."""

    async def serve(scenario: Scenario) -> None:
        app = Application()
        config = uvicorn.Config(
            app, http=BoundedProtocol, port=0, lifespan="off", log_config=None,
            h11_max_incomplete_event_size=BYTES, timeout_keep_alive=PATIENCE_S,
        )  # fmt: skip
        config.h11_max_header_count = HEADERS  # type: ignore[attr-defined]
        server = uvicorn.Server(config)
        running = asyncio.ensure_future(server.serve())
        await until(lambda: server.started or running.done())
        try:
            async with asyncio.timeout(PATIENCE_S):
                await scenario(Serving(server, app))
                await until(lambda: not server.server_state.connections)
                await until(lambda: not server.server_state.tasks)
        finally:
            app.go.set()
            server.should_exit = True
            await running

    def played(scenario: Scenario) -> None:
        factory = uvloop.new_event_loop if request.param == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(serve(scenario))

    yield played
    assert not [r.getMessage() for r in caplog.records if r.levelno > logging.WARNING or r.exc_info]


@pytest.fixture
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", SLOW_S)
    monkeypatch.setattr(protocol, "REST_S", SLOW_S)


@pytest.mark.usefixtures("short_times")
@pytest.mark.parametrize("begin", [b"G", b"GET /x HTTP/1.1\r\nHost: ser", b"\r\n"])
def test_a_slow_head_is_refused(play: Play, begin: bytes) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client(begin) as client:
            await client.expect_refusal(408, "within 0.3 s")
        assert serving.app.paths == []

    play(scenario)


@pytest.mark.usefixtures("short_times")
def test_bytes_do_not_prolong_the_time_of_a_head(play: Play) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client(b"GET /x HTTP/1.1\r\nA: ") as client:
            connection = await serving.connection()
            clock = connection._clock
            while not connection._over:
                assert connection._clock is clock
                client.send(b"x")
                await asyncio.sleep(0.01)
            await client.expect_refusal(408, "within 0.3 s")

    play(scenario)


@pytest.mark.usefixtures("short_times")
def test_a_silent_connection_is_closed(play: Play) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            await client.expect_end()

    play(scenario)


@pytest.mark.parametrize("begin", [b"G", b"\r\n"])
def test_the_next_head_of_a_connection_has_its_time_too(
    play: Play, begin: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client(GET % (b"1", b"")) as client:
            await client.expect("/1 0")
            monkeypatch.setattr(protocol, "HEAD_S", SLOW_S)
            assert (await serving.connection())._clock is None
            client.send(begin)
            await client.expect_refusal(408, "within 0.3 s")
        assert serving.app.paths == ["/1"]

    play(scenario)


@pytest.mark.parametrize("rest", [b"1", b"1\r\nx\r\n", b"0\r\n"])
def test_the_rest_of_a_body_does_not_hold_a_connection_that_was_answered(
    play: Play, rest: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client(CHUNKED % b"early") as client:
            await client.expect("/early 0")
            monkeypatch.setattr(protocol, "REST_S", SLOW_S)
            client.send(rest)
            await client.expect_end()

    play(scenario)


def test_a_connection_is_idle_when_the_rest_of_a_body_has_come(play: Play) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client(CHUNKED % b"early") as client:
            await client.expect("/early 0")
            client.send(b"1\r\nx\r\n")
            connection = await serving.connection()
            await until(lambda: connection._clock is not None)
            assert connection.timeout_keep_alive_task is None
            client.send(b"0\r\n\r\n")
            await until(lambda: connection.timeout_keep_alive_task is not None)
            assert connection._clock is None
            client.send(b"GET")
            await until(lambda: connection._clock is not None)
            assert connection.timeout_keep_alive_task is None
            client.send(b" /2 HTTP/1.1\r\n\r\n")
            await client.expect("/2 0")

    play(scenario)


@TOO_LARGE
def test_a_large_head_is_refused(play: Play, head: bytes) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            client.send(head)
            await client.expect_refusal(431, "more than 1000 bytes or 20 headers")
        assert serving.app.paths == []

    play(scenario)


@TOO_LARGE
def test_the_next_head_of_a_connection_is_bounded_too(play: Play, head: bytes) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            client.send(GET % (b"1", b""))
            await client.expect("/1 0")
            client.send(head)
            await client.expect_refusal(431, "more than 1000 bytes or 20 headers")
        assert serving.app.paths == ["/1"]

    play(scenario)


def test_a_head_is_bounded_however_it_comes(play: Play) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            client.send(b"GET / HTTP/1.1\r\nA: ")
            connection = await serving.connection()
            for size in range(30, BYTES, 10):
                await until(lambda: connection._size > 0)
                client.send(b"x" * (size - connection._size))
                await until(lambda size=size: connection._size == size)
            client.send(b"x" * 11)
            await client.expect_refusal(431, "more than 1000 bytes")

    play(scenario)


def test_heads_within_the_bounds_and_large_bodies_are_served(play: Play) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            for _ in range(3):
                client.send(GET % (b"full", b"A: 1\r\n" * (HEADERS - 1)))
                await client.expect("/full 0")
                client.send(GET % (b"long", b"A: " + b"x" * (BYTES - 100) + b"\r\n"))
                await client.expect("/long 0")
                client.send(POST % (b"large", 10**6) + b"x" * 10**6)
                await client.expect("/large 1000000")
            client.send(CHUNKED % b"chunked" + b"1\r\nx\r\n" * 5000 + b"0\r\nA: trailer\r\n\r\n")
            await client.expect("/chunked 5000")
            assert (await serving.connection())._clock is None
        assert serving.app.paths == ["/full", "/long", "/large"] * 3 + ["/chunked"]

    play(scenario)


def test_a_head_and_a_body_may_come_in_pieces(play: Play) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            for byte in POST % (b"pieces", 5):
                client.send(bytes([byte]))
                await asyncio.sleep(0)
            client.send(b"01")
            await until(lambda: serving.app.paths == ["/pieces"])
            client.send(b"234")
            await client.expect("/pieces 5")
            long = b"x" * (BYTES - 100)
            client.send(CHUNKED % long)
            await until(lambda: len(serving.app.paths) == 2)
            client.send(b"0" * 150)
            connection = await serving.connection()
            await until(lambda: connection._size == 150)
            client.send(b"1\r\nx\r\n0\r\n\r\n")
            await client.expect(f"/{long.decode()} 1")

    play(scenario)


def test_who_expects_100_gets_it(play: Play) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            client.send((POST % (b"asks", 4))[:-2] + b"Expect: 100-continue\r\n\r\n")
            assert (await client.answer())[0] == 100
            client.send(b"body")
            await client.expect("/asks 4")

    play(scenario)


def test_requests_in_one_packet_are_answered_one_by_one(play: Play) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            client.send(GET % (b"1", b"") + POST % (b"2", 2000) + b"x" * 1999)
            await client.expect("/1 0")
            client.send(b"x" + GET % (b"3", b"") + b"GET /4 HT")
            await client.expect("/2 2000", "/3 0")
            client.send(b"TP/1.1\r\n\r\n" + GET % (b"5", b""))
            await client.expect("/4 0", "/5 0")
        assert serving.app.paths == ["/1", "/2", "/3", "/4", "/5"]

    play(scenario)


BAD = {
    "large": (GET % (b"x" * BYTES, b""), 431),
    "many": (GET % (b"x", b"A: 1\r\n" * HEADERS), 431),
    "no HTTP": (b"no HTTP\r\n\r\n", 400),
    "no path": (b"GET \xff HTTP/1.1\r\n\r\n", 400),
    "no proxy": (b"CONNECT a:1 HTTP/1.1\r\n\r\n", 400),
}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("bad", "status"), BAD.values(), ids=BAD)
def test_nothing_is_called_after_a_refusal(play: Play, bad: bytes, status: int, kept: bool) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            if kept:
                client.send(GET % (b"1", b""))
                await client.expect("/1 0")
            client.send(bad + GET % (b"after", b"") * 3)
            await client.expect_refusal(status, "")
        assert serving.app.paths == ["/1"] * kept

    play(scenario)


@pytest.mark.parametrize("bad", [bad for bad, _ in BAD.values()], ids=BAD)
def test_earlier_requests_are_answered_before_the_connection_ends(play: Play, bad: bytes) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            client.send(GET % (b"held", b"") + GET % (b"2", b"") + bad)
            await serving.app.begun.wait()
            connection = await serving.connection()
            assert connection._over
            size = connection._size
            connection.data_received(GET % (b"after", b""))  # reading is paused meanwhile
            assert connection._size == size
            serving.app.go.set()
            await client.expect("/held 0", "/2 0")
            await client.expect_end()
        assert serving.app.paths == ["/held", "/2"]

    play(scenario)


def test_a_head_has_no_timer_while_an_earlier_answer_is_under_way(play: Play) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            client.send(POST % (b"held", 4) + b"body")
            await serving.app.begun.wait()
            client.send(b"\r\nGET /2 HT")
            connection = await serving.connection()
            await until(lambda: connection._size == 11)
            assert connection._clock is None
            serving.app.go.set()
            await client.expect("/held 4")
            client.send(b"TP/1.1\r\n\r\n")
            await client.expect("/2 0")

    play(scenario)


@pytest.mark.parametrize("path", ["/early", "/read"])
def test_trailers_are_bounded(play: Play, path: str) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            client.send(CHUNKED % path[1:].encode() + b"4\r\nbody\r\n0\r\nA: ")
            await until(lambda: serving.app.paths == [path])
            if path == "/early":
                await client.expect("/early 0")
            client.send(b"x" * (BYTES + 1))
            await client.expect_refusal(431, "more than 1000 bytes")
        await until(lambda: serving.app.paths == [path, "left"][: 1 if path == "/early" else 2])

    play(scenario)


def test_a_malformed_body_is_refused_at_once(play: Play) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            client.send(CHUNKED % b"x")
            await until(lambda: serving.app.paths == ["/x"])
            client.send(b"no number\r\n")
            await client.expect_refusal(400, "Invalid HTTP request")
        await until(lambda: serving.app.paths == ["/x", "left"])

    play(scenario)


def test_a_malformed_body_does_not_disturb_an_earlier_answer(play: Play) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            client.send(GET % (b"held", b"") + CHUNKED % b"2" + b"no number\r\n")
            await serving.app.begun.wait()
            assert (await serving.connection())._over
            serving.app.go.set()
            await client.expect("/held 0")
            await until(lambda: serving.app.paths == ["/held", "/2"])
        await until(lambda: serving.app.paths == ["/held", "/2", "left"])

    play(scenario)


@pytest.mark.parametrize("kept", [False, True])
def test_a_websocket_has_no_timer(play: Play, kept: bool) -> None:
    upgrade = (
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    )

    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            if kept:
                client.send(GET % (b"1", b""))
                await client.expect("/1 0")
            else:
                client.send(b"G")
            connection = await serving.connection()
            client.send((GET % (b"ws", upgrade))[0 if kept else 1 :])
            assert (await client.answer())[0] == 101
            assert connection._over
            assert connection._clock is None
            client.send(b"\x81\x80\x00\x00\x00\x00")
            assert await client.reader.readexactly(12) == b"\x81\x0astill here"

    play(scenario)


def test_an_unknown_upgrade_without_a_body_is_an_ordinary_request(play: Play) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            client.send(GET % (b"h2c", b"Connection: Upgrade\r\nUpgrade: h2c\r\n"))
            await client.expect("/h2c 0")
            client.send(GET % (b"2", b""))
            await client.expect("/2 0")

    play(scenario)


@pytest.mark.parametrize("kept", [False, True])
def test_a_client_that_leaves_leaves_no_timer(play: Play, kept: bool) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            if kept:
                client.send(GET % (b"1", b""))
                await client.expect("/1 0")
            client.send(b"GET /")
            connection = await serving.connection()
            await until(lambda: connection._size == 5)
            clock = connection._clock
            assert not clock.cancelled()
        await until(lambda: not serving.connections)
        assert clock.cancelled()
        assert connection._clock is None

    play(scenario)


def test_a_client_that_sends_far_too_much_can_read_why(play: Play) -> None:
    async def scenario(serving: Serving) -> None:
        url = "http://{}:{}/".format(*serving.address)
        answer = await asyncio.to_thread(httpx.get, url, headers={"A": "x" * 10**6})
        assert answer.status_code == 431

    play(scenario)


@pytest.mark.parametrize(
    ("options", "headers"), [((), 128), (("--h11-max-header-count", "300"), 300)]
)
def test_the_server_has_the_bounds_and_options_of_vllm_set_them(
    options: tuple[str, ...], headers: int
) -> None:
    args, _ = parse_arguments(make_parser(), ["DIR", "--host", "127.0.0.1", *options])
    with (
        socket.create_server(("127.0.0.1", 0)) as bound,
        listening(PlainTextResponse("hi"), args, bound),
        httpx.Client(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}", timeout=60) as client,
    ):
        own = len(client.build_request("GET", "/").headers)
        for count, status in ((headers - own, 200), (headers - own + 1, 431)):
            assert client.get("/", headers=[("A", "1")] * count).status_code == status
