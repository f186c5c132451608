"""The listener of the start, and its hand-over to the next, with real sockets and TLS."""

import argparse
import asyncio
import socket
import ssl
from pathlib import Path

import httpx
import pytest
import trustme

from sliceserve.server.auth import KeyRing
from sliceserve.server.health import Lifecycle, Readiness
from sliceserve.server.layering import Access, guarded, still_starting
from sliceserve.server.listener import listening, make_listener
from sliceserve.server.serve import make_parser, parse_arguments


def options(*arguments: str) -> argparse.Namespace:
    args, _ = parse_arguments(make_parser(), ["DIR", "--host", "127.0.0.1", *arguments])
    return args


def test_tls_holds_while_the_model_loads(tmp_path: Path) -> None:
    authority, pem = trustme.CA(), tmp_path / "key-and-chain.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
    args = options("--ssl-certfile", str(pem), "--ssl-keyfile", str(pem))
    access = Access(KeyRing(["key"]), frozenset(), {})
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with listening(guarded(still_starting, access, Readiness(Lifecycle())), args, bound):
            with httpx.Client(base_url=f"https://{address}", verify=trust, timeout=60) as client:
                assert client.get("/livez").status_code == 200
                assert client.get("/v1/models").status_code == 401
                answer = client.get("/v1/models", headers={"Authorization": "Bearer key"})
                assert answer.status_code == 503
            with pytest.raises(httpx.TransportError):
                httpx.get(f"http://{address}/livez", timeout=60)


def test_who_connects_between_two_listeners_waits_for_the_second() -> None:
    args = options()
    app = guarded(still_starting, Access(KeyRing(), frozenset(), {}), Readiness(Lifecycle()))

    async def second(bound: socket.socket) -> None:
        listener = make_listener(app, args, lifespan="off")
        running = asyncio.ensure_future(listener.serve(sockets=[bound]))
        while not listener.started:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(check, early)
        listener.should_exit = True
        await running

    def check(connection: socket.socket) -> None:
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")

    with socket.create_server(("127.0.0.1", 0)) as bound:
        address = bound.getsockname()
        with listening(app, args, bound):
            assert httpx.get(f"http://127.0.0.1:{address[1]}/livez", timeout=60).status_code == 200
        with socket.create_connection(address, timeout=60) as early:
            early.sendall(b"GET /livez HTTP/1.1\r\nHost: server\r\n\r\n")
            asyncio.run(second(bound))
