"""A small application behind a real uvicorn, and clients that speak bytes to it over sockets."""

import asyncio
import json
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import uvicorn
import uvloop

from sliceserve.server.protocol import BoundedProtocol

BYTES, HEADERS, PATIENCE_S = 1000, 20, 60
SLOW_S = 0.3
GET = b"GET /%b HTTP/1.1\r\nHost: server\r\n%b\r\n"
POST = b"POST /%b HTTP/1.1\r\nHost: server\r\nContent-Length: %d\r\n\r\n"
CHUNKED = b"POST /%b HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"


class Application:
    """Answers with the path and the size of the body; /early without a look at the body.

    Below /held, answers begin and do not end until they are let go.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.begun, self.go = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await receive()
            await send({"type": "websocket.send", "text": "still here"})
            return
        path, size, more = scope["path"], 0, scope["path"] != "/early"
        self.paths.append(path)
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.paths.append("left")
                return
            size, more = size + len(message["body"]), message["more_body"]
        text = f"{path} {size}".encode()
        headers = [(b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if path.startswith("/held"):
            self.begun.set()
            await self.go.wait()
        await send({"type": "http.response.body", "body": text})


class Client:
    """A connection that is read answer by answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def reset(self) -> None:
        """Break the connection off: the server's side ends with an error."""
        end = self.writer.get_extra_info("socket")
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        pairs = (line.split(": ", 1) for line in head[1:] if line)
        headers = {name.lower(): value for name, value in pairs}
        size = int(headers.get("content-length", 0))
        return int(head[0].split()[1]), headers, await self.reader.readexactly(size)

    async def expect(self, *texts: str) -> None:
        for text in texts:
            assert (await self.answer())[::2] == (200, text.encode())

    async def expect_refusal(self, status: int, text: str) -> None:
        found, headers, body = await self.answer()
        error = json.loads(body)["error"]
        assert (found, headers["connection"]) == (status, "close")
        assert (error["code"], error["param"]) == (status, None)
        assert text in error["message"]
        assert headers["content-type"] == "application/json"
        assert headers["server"] == "uvicorn"
        await self.expect_end()

    async def expect_end(self) -> None:
        assert await self.reader.read() == b""


class Serving:
    """A server and what it is asked."""

    def __init__(self, server: uvicorn.Server, app: Application) -> None:
        self.app = app
        self._server = server
        self.address = server.servers[0].sockets[0].getsockname()

    @property
    def connections(self) -> set[Any]:
        return self._server.server_state.connections

    @asynccontextmanager
    async def client(self, first: bytes = b"") -> AsyncIterator[Client]:
        """Connect; the first bytes are there before the server knows of the connection."""
        connected = socket.create_connection(self.address)
        connected.sendall(first)
        connected.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=connected)
        try:
            yield Client(reader, writer)
        finally:
            writer.close()

    async def connection(self) -> Any:
        """Return the server's side of the only connection."""
        await until(lambda: len(self.connections) == 1)
        return next(iter(self.connections))


async def until(wanted: Callable[[], bool]) -> None:
    while not wanted():
        await asyncio.sleep(0.001)


Scenario = Callable[[Serving], Awaitable[None]]
Play = Callable[[Scenario], None]


@contextmanager
def playing(
    loop: str,
    caplog: pytest.LogCaptureFixture,
    layered: Callable[[Application], Any] = lambda app: app,
) -> Iterator[Play]:
    """What runs a scenario against a server with small bounds, on a kind of loops that we use."""

    async def serve(scenario: Scenario) -> None:
        app = Application()
        config = uvicorn.Config(
            layered(app), http=BoundedProtocol, port=0, lifespan="off", log_config=None,
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
        factory = uvloop.new_event_loop if loop == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(serve(scenario))

    yield played
    assert not [r.getMessage() for r in caplog.records if r.levelno > logging.WARNING or r.exc_info]
