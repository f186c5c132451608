"""TLS files that change while a real uvicorn serves: who connects anew sees the new ones."""

import argparse
import asyncio
import logging
import shutil
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trustme
from starlette.responses import PlainTextResponse

from sliceserve.server import certificates
from sliceserve.server.certificates import refreshing_certificates
from sliceserve.server.listener import check_tls, make_listener
from sliceserve.server.serve import make_parser, parse_arguments

PATIENCE_S = 60
Handshake = Callable[[], Awaitable[str]]

AUTHORITY = trustme.CA()


def issued() -> trustme.LeafCert:
    return AUTHORITY.issue_cert("127.0.0.1")


def whole(directory: Path, _number: int) -> None:
    """Write the file anew."""
    issued().private_key_and_cert_chain_pem.write_to_path(directory / "tls.pem")


def moved(directory: Path, _number: int) -> None:
    """Move another file in its place."""
    issued().private_key_and_cert_chain_pem.write_to_path(directory / "new")
    (directory / "new").rename(directory / "tls.pem")


def linked(directory: Path, number: int) -> None:
    """Have a link lead to another directory, as Kubernetes does with a Secret."""
    version, data, file = directory / f"v{number}", directory / "data", directory / "tls.pem"
    version.mkdir()
    issued().private_key_and_cert_chain_pem.write_to_path(version / "tls.pem")
    (directory / "new").symlink_to(version.name)
    (directory / "new").rename(data)
    if not number:
        file.symlink_to("data/tls.pem")
    else:
        shutil.rmtree(directory / f"v{number - 1}")


def play(scenario: Callable[[Handshake], Awaitable[None]], *options: str) -> None:
    """Run a scenario against a server; a handshake returns the certificate's number."""
    arguments = ["DIR", "--host", "127.0.0.1", "--enable-ssl-refresh", *options]
    args, _ = parse_arguments(make_parser(), arguments)
    check_tls(args)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        asyncio.run(serve(scenario, args, bound))


async def serve(
    scenario: Callable[[Handshake], Awaitable[None]], args: argparse.Namespace, bound: socket.socket
) -> None:
    trust = ssl.create_default_context()
    AUTHORITY.configure_trust(trust)

    async def handshake() -> str:
        host, port = bound.getsockname()
        _, writer = await asyncio.open_connection(host, port, ssl=trust)
        number: str = writer.get_extra_info("peercert")["serialNumber"]
        writer.close()
        return number

    listener = make_listener(PlainTextResponse("hi"), args, lifespan="off")
    with refreshing_certificates(listener.config, args):
        running = asyncio.ensure_future(listener.serve(sockets=[bound]))
        while not listener.started:
            await asyncio.sleep(0.01)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await scenario(handshake)
        finally:
            listener.should_exit = True
            await running


async def another(handshake: Handshake, known: set[str]) -> str:
    """The first certificate that is none of these."""
    while (found := await handshake()) in known:
        await asyncio.sleep(0.01)
    return found


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "INTERVAL_S", 0.02)


@pytest.mark.parametrize("put", [whole, moved, linked])
def test_a_certificate_is_rotated_again_and_again(
    put: Callable[[Path, int], None], tmp_path: Path
) -> None:
    async def scenario(handshake: Handshake) -> None:
        known = {await handshake()}
        for number in (1, 2, 3):
            put(tmp_path, number)
            known.add(await another(handshake, known))

    put(tmp_path, 0)
    play(scenario, "--ssl-certfile", str(tmp_path / "tls.pem"))


def test_a_certificate_whose_key_is_yet_to_come_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = tmp_path / "cert", tmp_path / "key"

    async def scenario(handshake: Handshake) -> None:
        known = {await handshake()}
        new = issued()
        certificate.write_bytes(new.cert_chain_pems[0].bytes())
        while not warnings():
            assert {await handshake()} == known
        assert {await handshake()} == known
        key.write_bytes(new.private_key_pem.bytes())
        known.add(await another(handshake, known))
        key.unlink()
        while len(warnings()) < 2:
            assert await handshake() in known
        assert {await handshake()} < known

    def warnings() -> set[str]:
        name = "vllm.sliceserve.certificates"
        found = [r for r in caplog.records if (r.name, r.levelno) == (name, logging.WARNING)]
        return {record.getMessage() for record in found}

    first = issued()
    certificate.write_bytes(first.cert_chain_pems[0].bytes())
    key.write_bytes(first.private_key_pem.bytes())
    # vLLM's logger passes nothing on.
    logging.getLogger("vllm").addHandler(caplog.handler)
    try:
        play(scenario, "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    finally:
        logging.getLogger("vllm").removeHandler(caplog.handler)
    for said, reason in zip(sorted(warnings()), ("No such file", "MISMATCH"), strict=True):
        assert "unusable; the last ones stay valid" in said
        assert reason in said
