"""The listener of the start, and its hand-over to the next, with real sockets and TLS."""

import argparse
import asyncio
import socket
import ssl
from pathlib import Path

import httpx
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from prometheus_client import CollectorRegistry
from starlette.responses import PlainTextResponse

from sliceserve.server import protocol
from sliceserve.server.auth import KeyRing
from sliceserve.server.health import Lifecycle, Readiness
from sliceserve.server.layering import Access, guarded, still_starting
from sliceserve.server.listener import check_tls, listening, make_listener
from sliceserve.server.metrics import ServerMetrics
from sliceserve.server.serve import make_parser, parse_arguments
from sliceserve.slicing.errors import UserError


def options(*arguments: str) -> argparse.Namespace:
    args, _ = parse_arguments(make_parser(), ["DIR", "--host", "127.0.0.1", *arguments])
    return args


@pytest.fixture
def tls_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a certificate, its key, its CA, another's key and its key encrypted; and no PEM."""
    monkeypatch.chdir(tmp_path)
    authority = trustme.CA()
    issued, other = (authority.issue_cert("127.0.0.1") for _ in range(2))
    issued.cert_chain_pems[0].write_to_path("cert")
    issued.private_key_pem.write_to_path("key")
    other.private_key_pem.write_to_path("other")
    authority.cert_pem.write_to_path("ca")
    key = load_pem_private_key(issued.private_key_pem.bytes(), None)
    encryption = BestAvailableEncryption(b"password")
    Path("encrypted").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    Path("text").write_text("no PEM")


PAIR = "--ssl-certfile cert --ssl-keyfile key"
NO_PAIR = "no certificate with its unencrypted key in PEM"


@pytest.mark.usefixtures("tls_files")
@pytest.mark.parametrize(
    ("given", "named", "complaint"),
    [
        ("--ssl-keyfile key", "--ssl-keyfile key", "no --ssl-certfile"),
        ("--ssl-ca-certs ca", "--ssl-ca-certs ca", "no --ssl-certfile"),
        ("--ssl-cert-reqs 2", "--ssl-cert-reqs 2", "no --ssl-certfile"),
        ("--ssl-ciphers AES", "--ssl-ciphers AES", "no --ssl-certfile"),
        ("--enable-ssl-refresh", "--enable-ssl-refresh", "no --ssl-certfile"),
        (f"{PAIR} --ssl-ca-certs ca", "--ssl-ca-certs ca", "without --ssl-cert-reqs 2"),
        (f"{PAIR} --ssl-cert-reqs 1", "--ssl-cert-reqs 1", "no --ssl-ca-certs"),
        (f"{PAIR} --ssl-cert-reqs 2", "--ssl-cert-reqs 2", "no --ssl-ca-certs"),
        (f"{PAIR} --ssl-cert-reqs 3", "--ssl-cert-reqs 3", "0, 1 or 2"),
        (f"{PAIR} --ssl-ciphers none", "--ssl-ciphers none", "OpenSSL has none"),
        ("--ssl-certfile no --ssl-keyfile key", "--ssl-certfile no", "No such file"),
        ("--ssl-certfile cert --ssl-keyfile no", "--ssl-keyfile no", "No such file"),
        ("--ssl-certfile cert --ssl-keyfile .", "--ssl-keyfile .", "Is a directory"),
        (f"{PAIR} --ssl-cert-reqs 2 --ssl-ca-certs no", "--ssl-ca-certs no", "No such file"),
        (f"{PAIR} --ssl-cert-reqs 2 --ssl-ca-certs text", "--ssl-ca-certs text", "no certificate"),
        ("--ssl-certfile text --ssl-keyfile key", "--ssl-certfile text", NO_PAIR),
        ("--ssl-certfile cert --ssl-keyfile text", "--ssl-keyfile text", NO_PAIR),
        ("--ssl-certfile cert --ssl-keyfile other", "--ssl-keyfile other", NO_PAIR),
        ("--ssl-certfile cert --ssl-keyfile encrypted", "--ssl-keyfile encrypted", NO_PAIR),
        ("--ssl-certfile cert", "--ssl-certfile cert", NO_PAIR),
    ],
)
def test_tls_options_of_no_use_are_refused(given: str, named: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        check_tls(options(*given.split()))
    message = str(caught.value)
    assert named in message
    assert complaint in message
    assert "\n" not in message


@pytest.mark.usefixtures("tls_files")
def test_tls_options_of_use_are_not_refused() -> None:
    certificate, key = Path("cert").read_bytes(), Path("key").read_bytes()
    Path("both").write_bytes(key + certificate)
    for given in (
        "", PAIR, "--ssl-certfile both --enable-ssl-refresh", f"{PAIR} --ssl-ciphers ECDHE+AESGCM",
        f"{PAIR} --ssl-cert-reqs 2 --ssl-ca-certs ca --enable-ssl-refresh",
    ):  # fmt: skip
        args = options(*given.split())
        check_tls(args)
        assert (make_listener(still_starting, args).config.ssl is not None) == bool(given)


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


def test_a_client_needs_a_certificate_of_the_ca_that_is_asked_for(tmp_path: Path) -> None:
    authority, of_clients, pem = trustme.CA(), trustme.CA(), tmp_path / "key-and-chain.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
    of_clients.cert_pem.write_to_path(tmp_path / "clients.pem")
    args = options(
        "--ssl-certfile", str(pem), "--ssl-cert-reqs", "2",
        "--ssl-ca-certs", str(tmp_path / "clients.pem"),
    )  # fmt: skip
    check_tls(args)
    app = guarded(still_starting, Access(KeyRing(), frozenset(), {}), Readiness(Lifecycle()))

    def ask(issuer: trustme.CA | None) -> int:
        trust = ssl.create_default_context()
        authority.configure_trust(trust)
        if issuer is not None:
            issuer.issue_cert("client.example").configure_cert(trust)
        url = f"https://127.0.0.1:{bound.getsockname()[1]}/livez"
        return httpx.get(url, verify=trust, timeout=60).status_code

    with socket.create_server(("127.0.0.1", 0)) as bound, listening(app, args, bound):
        assert ask(of_clients) == 200
        for issuer in (None, authority):
            with pytest.raises(httpx.TransportError):
                ask(issuer)
        assert ask(of_clients) == 200


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


def test_refused_heads_are_counted_and_requests_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry, "m")
    good = b"GET / HTTP/1.1\r\nHost: server\r\n%b\r\n"
    body = b"POST / HTTP/1.1\r\nHost: server\r\nTransfer-Encoding: chunked\r\n\r\nno number\r\n"

    def ask(address: tuple[str, int], data: bytes) -> bytes:
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(data)
            with connection.makefile("rb") as answer:
                return answer.readline()

    def counted() -> dict[int, float | None]:
        name = "sliceserve_refused_heads_total"
        return {
            status: registry.get_sample_value(name, {"model_name": "m", "status": str(status)})
            for status in (400, 408, 431)
        }

    def ask_all(address: tuple[str, int]) -> None:
        for data, status, expected in (
            (good % b"", 200, {400: 0, 408: 0, 431: 0}),
            (body, 400, {400: 0, 408: 0, 431: 0}),
            (b"no HTTP\r\n\r\n", 400, {400: 1, 408: 0, 431: 0}),
            (good % b"" + b"no HTTP\r\n\r\n", 200, {400: 2, 408: 0, 431: 0}),
            (good % (b"A: 1\r\n" * 200), 431, {400: 2, 408: 0, 431: 1}),
        ):
            assert ask(address, data).startswith(b"HTTP/1.1 %d " % status), data
            assert counted() == expected, data
        monkeypatch.setattr(protocol, "HEAD_S", 0.1)
        assert ask(address, good[:20]).startswith(b"HTTP/1.1 408 ")
        assert counted() == {400: 2, 408: 1, 431: 1}

    async def serve(bound: socket.socket) -> None:
        count = metrics.count_refused_head
        listener = make_listener(PlainTextResponse("hi"), options(), count, lifespan="off")
        running = asyncio.ensure_future(listener.serve(sockets=[bound]))
        while not listener.started:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(ask_all, bound.getsockname())
        listener.should_exit = True
        await running

    with socket.create_server(("127.0.0.1", 0)) as bound:
        asyncio.run(serve(bound))
