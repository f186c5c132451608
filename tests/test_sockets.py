"""How long a WebSocket may be open, and what is logged of it: our layers, uvicorn and a client."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from sliceserve.server.auth import KeyRing
from sliceserve.server.drain import Drain
from sliceserve.server.health import EngineProbe, Lifecycle, Phase
from sliceserve.server.layering import Access, while_serving
from sliceserve.server.listener import make_listener
from sliceserve.server.metrics import ServerMetrics
from sliceserve.server.serve import make_parser, parse_arguments
from sliceserve.server.settings import ServerSettings
from sliceserve.server.sockets import SocketDeadline

PATIENCE_S = 60.0
KEY = {"Authorization": "Bearer key"}


class Application:
    """Echoes below /echo, and listens to nobody elsewhere."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    async def echo(self, client: WebSocket) -> None:
        await client.accept()
        try:
            while (text := await client.receive_text()) != "close":
                await client.send_text(text)
            await client.close(4000, "as asked")
        except WebSocketDisconnect:
            self.ended.append("left")
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise

    async def deaf(self, client: WebSocket) -> None:
        await client.accept()
        await client.send_text("begun")
        await asyncio.Event().wait()

    async def silent(self, _client: WebSocket) -> None:
        await asyncio.Event().wait()

    @property
    def app(self) -> Any:
        handlers = {"echo": self.echo, "deaf": self.deaf, "silent": self.silent}
        return Starlette(routes=[WebSocketRoute(f"/{k}", v) for k, v in handlers.items()])


class Serving:
    """A server and what it is asked."""

    def __init__(self, port: int, application: Application, drain: Drain, lifecycle: Lifecycle):
        self.port, self.drain, self.lifecycle = port, drain, lifecycle
        self.ended = application.ended

    def client(self, path: str, headers: dict[str, str] = KEY) -> connect:
        return connect(f"ws://127.0.0.1:{self.port}{path}", additional_headers=headers, proxy=None)

    async def until(self, wanted: Callable[[], bool]) -> None:
        while not wanted():
            await asyncio.sleep(0.01)


def play(scenario: Callable[[Serving], Awaitable[None]], seconds: float) -> None:
    """Run a scenario against a server that gives requests so many seconds."""
    application, lifecycle = Application(), Lifecycle(Phase.SERVING)
    stand_in: Any = SimpleNamespace(queue=None, queued_tokens=int)

    async def answer() -> None:
        pass

    async def serve(bound: socket.socket) -> None:
        app, drain = while_serving(
            application.app, stand_in, EngineProbe(answer, 1),
            Access(KeyRing(["key"]), frozenset(), {}), ServerSettings(request_timeout=seconds),
            lifecycle, ServerMetrics(CollectorRegistry(), "m"), lambda _exchange: None,
            max_logprobs=20, vocabulary=257, traces=False,
        )  # fmt: skip
        args, _ = parse_arguments(make_parser(), ["DIR", "--host", "127.0.0.1"])
        listener = make_listener(app, args, lifespan="off")
        running = asyncio.ensure_future(listener.serve(sockets=[bound]))
        serving = Serving(bound.getsockname()[1], application, drain, lifecycle)
        await serving.until(lambda: listener.started)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await scenario(serving)
                await serving.until(lambda: not drain.running)
        finally:
            listener.should_exit = True
            await running

    with socket.create_server(("127.0.0.1", 0)) as bound:
        asyncio.run(serve(bound))


async def end_of(client: ClientConnection) -> tuple[int, str]:
    """The code and the reason of the server's close frame."""
    with pytest.raises(ConnectionClosed) as caught:
        await client.recv()
    assert caught.value.rcvd
    return caught.value.rcvd.code, caught.value.rcvd.reason


def test_a_websocket_whose_time_is_up_is_closed_and_its_place_is_free() -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client("/echo") as client:
            await client.send("hi")
            assert await client.recv() == "hi"
            assert serving.drain.running == 1
            assert await end_of(client) == (1008, "The WebSocket was open for 0.5 s.")
        assert serving.ended == ["cancelled"]

    play(scenario, 0.5)


def test_so_is_one_whose_application_does_not_listen() -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client("/deaf") as client:
            assert await client.recv() == "begun"
            assert await end_of(client) == (1008, "The WebSocket was open for 0.5 s.")

    play(scenario, 0.5)


def test_one_that_is_not_accepted_in_time_is_refused() -> None:
    async def scenario(serving: Serving) -> None:
        with pytest.raises(InvalidStatus) as caught:
            await serving.client("/silent")
        assert caught.value.response.status_code == 408
        assert b"open for 0.5 s" in caught.value.response.body

    play(scenario, 0.5)


def test_a_drain_waits_for_websockets_and_then_closes_them() -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client("/echo") as client, serving.client("/deaf") as other:
            await client.send("hi")
            assert await client.recv() == "hi"
            assert await other.recv() == "begun"
            serving.lifecycle.enter(Phase.DRAINING, "waiting for running requests")
            with pytest.raises(InvalidStatus) as caught:
                await serving.client("/echo")
            assert caught.value.response.status_code == 503
            await client.send("still here")
            assert await client.recv() == "still here"
            assert await serving.drain.wait(0) == 2
            serving.drain.cut()
            for one in (client, other):
                assert await end_of(one) == (1012, "The server is shutting down.")
        assert await serving.drain.wait(PATIENCE_S) == 0
        assert serving.ended == ["cancelled"]

    play(scenario, PATIENCE_S)


def test_neither_keys_in_queries_nor_refusals_as_errors_are_in_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A browser cannot send a WebSocket's key in a header, and anyone can be refused."""

    async def scenario(serving: Serving) -> None:
        with pytest.raises(InvalidStatus) as caught:
            await serving.client("/echo?api_key=guessed", {})
        refusal = caught.value.response
        assert refusal.status_code == 401
        assert json.loads(refusal.body or b"")["error"]["type"] == "AuthenticationError"
        assert refusal.headers["WWW-Authenticate"].startswith("Bearer")
        for path, status in (("/nowhere", 403), ("/silent", 408)):
            with pytest.raises(InvalidStatus) as caught:
                await serving.client(f"{path}?token=guessed")
            assert caught.value.response.status_code == status
        async with serving.client("/echo?key=guessed") as client:
            assert await end_of(client) == (1008, "The WebSocket was open for 0.5 s.")
        serving.lifecycle.enter(Phase.DRAINING, "waiting for running requests")
        with pytest.raises(InvalidStatus) as caught:
            await serving.client("/%3Fecho?guessed")
        assert caught.value.response.status_code == 503

    play(scenario, 0.5)
    lines = capsys.readouterr().err.splitlines()
    told = [line.partition('"WebSocket ')[2] for line in lines if '"WebSocket ' in line]
    assert told == [
        '/echo" 401', '/nowhere" 403', '/silent" 408', '/echo" [accepted]', '/%3Fecho" 503',
    ]  # fmt: skip
    assert not [line for line in lines if "guessed" in line or "ERROR" in line]


@pytest.mark.parametrize(
    ("path", "header"), [("/", "Content-Length: 5"), ("/" + "x" * 10_000, "X-Any: 1")]
)
def test_an_upgrade_that_cannot_be_read_does_not_hold_its_connection(
    path: str, header: str
) -> None:
    async def scenario(serving: Serving) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", serving.port)
        upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nHost: server\r\n"
        key = "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        writer.write(f"GET {path} HTTP/1.1\r\n{upgrade}{key}{header}\r\n\r\n".encode())
        async with asyncio.timeout(PATIENCE_S):
            said = await reader.read()
        assert b" 101 " not in said
        writer.close()

    play(scenario, PATIENCE_S)


def test_uvicorns_own_access_log_has_no_queries(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(serving: Serving) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", serving.port)
        writer.write(b"GET /echo?api_key=guessed HTTP/1.0\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 401 ")
        writer.close()

    play(scenario, PATIENCE_S)
    told = capsys.readouterr()
    assert '"GET /echo HTTP/1.0" 401' in told.out
    assert "guessed" not in told.out + told.err


def test_a_websocket_that_ends_by_itself_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(serving: Serving) -> None:
        async with serving.client("/echo") as client:
            await client.send("close")
            assert await end_of(client) == (4000, "as asked")
        async with serving.client("/echo") as client:
            await client.send("hi")
            assert await client.recv() == "hi"
        await serving.until(lambda: serving.ended == ["left"])
        serving.drain.cut()

    play(scenario, PATIENCE_S)
    # uvicorn's lines go past what pytest has of the log.
    kinds = {line.partition(":")[0] for line in capsys.readouterr().err.splitlines()}
    assert kinds == {"INFO"}


def test_one_that_is_over_when_its_time_is_up_is_told_nothing_more() -> None:
    """An application that takes its time to end, after its client has left or after its close."""
    told: list[str] = []

    async def ending(_scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        if (await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.close", "code": 4000})
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        told.append(message["type"])

    for kind in ("websocket.disconnect", "websocket.receive"):

        async def receive(kind: str = kind) -> Any:
            return {"type": kind}

        late = SocketDeadline(ending, 0.1)({"type": "websocket"}, receive, send)
        asyncio.run(asyncio.wait_for(late, PATIENCE_S))
    assert told == ["websocket.accept", "websocket.accept", "websocket.close"]


def test_a_timeout_of_the_applications_own_is_passed_on() -> None:
    async def failing(_scope: Any, _receive: Any, _send: Any) -> None:
        raise TimeoutError("of its own")

    async def nothing(*_message: Any) -> Any:
        pass

    layer = SocketDeadline(failing, PATIENCE_S)
    with pytest.raises(TimeoutError, match="of its own"):
        asyncio.run(layer({"type": "websocket"}, nothing, nothing))
