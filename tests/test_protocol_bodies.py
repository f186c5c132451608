"""What follows the head of a request, over real sockets to a real uvicorn: bodies, upgrades."""

from collections.abc import Iterator

import pytest
from socket_server import BYTES, CHUNKED, GET, POST, SLOW_S, Play, Serving, playing, until

from sliceserve.server import protocol


@pytest.fixture(params=["asyncio", "uvloop"])
def play(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[Play]:
    with playing(request.param, caplog) as play:
        yield play


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


def test_who_expects_100_gets_it(play: Play) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client() as client:
            client.send((POST % (b"asks", 4))[:-2] + b"Expect: 100-continue\r\n\r\n")
            assert (await client.answer())[0] == 100
            client.send(b"body")
            await client.expect("/asks 4")

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
