"""Heads of requests that are slow, too large or no HTTP, over real sockets to a real uvicorn."""

import asyncio
import socket
from collections.abc import Iterator

import httpx
import pytest
from socket_server import (
    BYTES,
    CHUNKED,
    GET,
    HEADERS,
    POST,
    SLOW_S,
    Play,
    Serving,
    playing,
    until,
)
from starlette.responses import PlainTextResponse

from sliceserve.server import protocol
from sliceserve.server.listener import listening
from sliceserve.server.serve import make_parser, parse_arguments

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


@pytest.fixture(params=["asyncio", "uvloop"])
def play(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[Play]:
    with playing(request.param, caplog) as play:
        yield play


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


def test_a_connection_that_is_broken_off_when_idle_leaves_no_timer(play: Play) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            client.send(GET % (b"1", b""))
            await client.expect("/1 0")
            connection = await serving.connection()
            await until(lambda: connection.timeout_keep_alive_task is not None)
            idle = connection.timeout_keep_alive_task
            client.reset()
        await until(lambda: not serving.connections)
        assert idle.cancelled()

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
